"""Whatever writes, and however the system refuses it: one line, status 2 for a place and 6 for a resource, no loss."""

import builtins
import contextlib
import errno
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import codistill as cd
from codistill.core.errors import CodistillError, ResourceError, UsageError
from codistill.core.files import system_error, write_atomically
from codistill.data.download import fetch

from .. import tiny
from .asserting import refused
from .running import arguments, end_state, run_here

pytestmark = pytest.mark.usefixtures("tiny_registered")
STATUS = {errno.EACCES: 2, errno.EROFS: 2, errno.ENAMETOOLONG: 2, errno.EPERM: 2, errno.EISDIR: 2, errno.ENOTDIR: 2}
STATUS |= dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EMFILE, errno.EIO, errno.EFBIG, errno.ENFILE), 6
)


@contextlib.contextmanager
def refusing(pattern: str, number: int) -> Iterator[list[str]]:
    """Refuse to make, open for writing, flush or rename what matches a pattern; yield what was refused."""
    refused_paths: list[str] = []

    def check(path: object, with_name: bool = True) -> None:
        name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        if name and re.search(pattern, str(name)):
            refused_paths.append(str(name))
            raise OSError(number, os.strerror(number), *([str(name)] if with_name else []))

    real_open, mkdir, fsync, replace = io.open, os.mkdir, os.fsync, os.replace

    def opening(file, mode="r", *more, **named):
        if set(mode) & set("wax+"):
            check(file)
        return real_open(file, mode, *more, **named)

    def flushing(descriptor):
        check(os.readlink(f"/proc/self/fd/{descriptor}"), with_name=False)
        return fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", opening)
        patch.setattr(builtins, "open", opening)
        patch.setattr(os, "mkdir", lambda path, *more, **named: (check(path), mkdir(path, *more, **named))[1])
        patch.setattr(os, "fsync", flushing)
        patch.setattr(os, "replace", lambda old, new, **named: (check(new), replace(old, new, **named))[1])
        yield refused_paths


@pytest.fixture(scope="module")
def colours(tmp_path_factory, tiny_registered):
    return str(tiny.write_npz(tmp_path_factory.mktemp("writers") / "colours.npz", tiny.data(train=20, test=21)))


@pytest.fixture(scope="module")
def whole(colours, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("codistill.training.trainer.write_report", lambda run, summary: None)
        out = tmp_path_factory.mktemp("whole") / "run"
        assert run_here(arguments(colours, out)) == 0
    return out


@pytest.mark.fault(91)
@pytest.mark.parametrize("number", STATUS)
def test_one_line_for_each_answer_of_the_system(number, tmp_path):
    with refusing("x.json", number), pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "x.json", b"{}")
    error = system_error(caught.value)
    assert (error.exit_status, type(error)) == ((2, UsageError) if STATUS[number] == 2 else (6, ResourceError))
    assert str(error).startswith(f"{tmp_path / 'x.json'}: {os.strerror(number)}: ") and list(tmp_path.iterdir()) == []


PLACES = {
    "the folder": (r"/run$", errno.ENOSPC, 6),
    "its lock": (r"\.lock$", errno.EACCES, 2),
    "its lock, on a disk without space": (r"\.lock$", errno.EDQUOT, 6),
    "config.json": (r"config\.json", errno.ESTALE, 6),
    "config.json, read only": (r"config\.json", errno.EROFS, 2),
    "checkpoints": (r"/checkpoints$", errno.EACCES, 2),
    "each checkpoint": (r"epoch-.*\.pt", errno.EDQUOT, 6),
    "the index": (r"index\.json", errno.EMFILE, 6),
    "metrics.jsonl": (r"metrics\.jsonl", errno.EROFS, 2),
    "events": (r"tensorboard", errno.ENOSPC, 0),
    "the report": (r"report\.html", errno.EACCES, 0),
    "summary.json": (r"summary\.json", errno.ESTALE, 6),
}


@pytest.mark.fault(91)
@pytest.mark.parametrize(("pattern", "number", "status"), PLACES.values(), ids=PLACES)
def test_a_training_whose_files_are_refused(colours, whole, tmp_path, capsys, monkeypatch, pattern, number, status):
    if "report" not in pattern:
        monkeypatch.setattr("codistill.training.trainer.write_report", lambda run, summary: None)
    out = tmp_path / "run"
    with refusing(pattern, number) as paths:
        assert run_here(arguments(colours, out)) == status
    assert paths
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match("codistill: (error|warning): ", line) for line in lines) and len(lines) <= 3, lines
    assert "bug" not in " ".join(lines) and os.strerror(number) in lines[-1]
    assert not list(tmp_path.rglob("*.tmp-*"))
    if status and "metrics" not in pattern:  # the run is finished, and its checkpoints hold the metrics
        again = ["resume", str(out)] if (out / "config.json").exists() else arguments(colours, out)
        assert run_here(again) == 0
    if "metrics" in pattern:
        cd.Run(out).write_metrics(cd.Run(out).checkpoints.load().rows)
    assert cd.Run(out).finished and end_state(out) == end_state(whole)


@pytest.mark.fault(91)
def test_an_error_of_a_writer_in_python_is_one_of_codistill(tmp_path, monkeypatch):
    monkeypatch.setattr("codistill.training.trainer.write_report", lambda run, summary: None)
    for pattern, number, kind in ((r"config\.json", errno.EROFS, UsageError), (r"/run$", errno.ENOSPC, ResourceError)):
        with refusing(pattern, number), pytest.raises(kind):
            cd.train(tiny.method(), tiny.data(), out=tmp_path / "run", settings=tiny.settings(epochs=1), show=False)


EXPORTS = {
    "no space": (r"student0.*safetensors", errno.ENOSPC, 6),
    "read only": (r"student0.*safetensors", errno.EROFS, 2),
    "a folder that cannot be made": (r"exports$", errno.EDQUOT, 6),
    "a folder that may not be made": (r"exports$", errno.EACCES, 2),
}


@pytest.mark.fault(91)
@pytest.mark.parametrize(("pattern", "number", "status"), EXPORTS.values(), ids=EXPORTS)
def test_an_export_that_is_refused(whole, tmp_path, capsys, pattern, number, status):
    run = shutil.copytree(whole, tmp_path / "run")
    with refusing(pattern, number):
        command = ["export", str(run), "--predictor", "student0", "--format", "safetensors"]
        refused(capsys, command, status, "exports", os.strerror(number))
    assert not list(run.glob("exports/*"))


@pytest.mark.fault(91)
def test_places_that_cannot_be_written_to(whole, colours, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    export = ["export", str(whole), "--predictor", "student0", "--out"]
    bench = ["bench", "dml", "--networks", "resnet20", "resnet20", "-b", "2", "--seconds", "0.01", "--profile"]
    for command in (
        [*export, "file/x.safetensors"],
        [*export, "folder.safetensors"],
        [*export, "x" * 300 + ".safetensors"],
        [*bench, "file/x.txt"],
        [*bench, "folder.safetensors"],
        *(arguments(colours, Path(out)) for out in ("file", "file/run", "x" * 300)),
    ):
        refused(capsys, command, 2, unchanged=tmp_path)


@pytest.mark.fault(91)
def test_a_sweep_whose_files_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("spec.toml").write_text('networks = ["tiny", "tiny"]\ndata = "packed"\ndata_dir = "none.npz"\n')
    for pattern, number, status in (
        (r"sweep$", errno.EACCES, 2),
        (r"logs", errno.ENOSPC, 6),
        (r"recipes/", errno.EDQUOT, 6),
        (r"table", errno.EROFS, 2),
    ):
        with refusing(pattern, number):
            refused(capsys, ["sweep", "spec.toml", "--out", "sweep"], status, os.strerror(number))
        assert not list(tmp_path.rglob("*.tmp-*"))


@pytest.mark.fault(91)
def test_a_download_whose_file_is_refused(tmp_path):
    for number, kind in ((errno.ENOSPC, ResourceError), (errno.EROFS, UsageError)):
        with refusing(r"x\.zip", number), pytest.raises(kind, match=os.strerror(number)):
            fetch("http://127.0.0.1:9/x.zip", tmp_path / "x.zip", 3, "md5:0")


@pytest.mark.fault(91)
def test_a_checkpoint_that_the_system_withholds_is_not_passed_over(whole, tmp_path, monkeypatch):
    """It may be whole: an older one in its place, and the deletion of it at the next save, would lose epochs."""
    read = Path.read_bytes

    def reading(path: Path) -> bytes:
        if path.name == "epoch-000002.pt":
            raise OSError(number, os.strerror(number), str(path))
        return read(path)

    for number, kind in ((errno.EACCES, CodistillError), (errno.EMFILE, CodistillError)):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", reading)
            with pytest.raises(kind, match=os.strerror(number)) as error:
                cd.Run(whole).load_method()
            assert "damaged" not in str(error.value)


@pytest.mark.fault(91)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_standard_output_without_space_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "codistill", "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 6 and done.stderr.startswith("codistill: error: ") and done.stderr.count("\n") == 1
