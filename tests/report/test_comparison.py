"""`codistill report`: the page of a run again, and one that compares several."""

import os
import re
import shutil
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest

import codistill as cd
from codistill.cli.main import main
from codistill.report import pictures
from codistill.report.comparison import comparison_page
from codistill.report.curves import colour_of
from codistill.report.groups import Seen, grouped
from codistill.report.page import seen_run
from codistill.report.pictures import NAME
from codistill.report.sources import run_folders

from .. import tiny
from .written import write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of two methods, one of them with two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    with tiny.registered():
        data = cd.dataset("packed", tiny.write_npz(folder / "colours.npz", tiny.data()))
        for kind, seed in ((cd.MFEF, 0), (cd.MFEF, 1), (cd.DML, 0)):
            students = [cd.network("tiny", 3) for _ in range(2)]
            method = kind(students, num_classes=3, image_size=(8, 8))
            out = folder / "all" / f"{kind.name}-{seed}"
            cd.train(method, data, out=out, settings=tiny.settings(seed=seed), show=False)
    return folder / "all"


@pytest.fixture
def here(monkeypatch, tmp_path, tiny_registered):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_that_differ_in_the_seed_are_one_group(folder):
    runs = run_folders([folder, folder / "dml-0"])
    assert [path.name for path in runs] == ["dml-0", "mfef-0", "mfef-1"]
    groups = grouped([seen_run(cd.Run(path)) for path in runs])
    assert [(group.name, len(group.runs)) for group in groups] == [("dml", 1), ("mfef", 2)]


def test_teachers_of_a_seed_each_tell_no_groups_apart(tmp_path):
    seen = []
    for seed, epochs in ((0, 2), (1, 2), (2, 3)):
        teacher = write_run(tmp_path / f"seed{seed}/0-resnet8", "independent", seed, {"student0": 30.0}, epochs=epochs)
        weights = [f"student0={teacher}"]
        own = {"teacher": str(teacher), "weights": weights, "init": None}
        run = write_run(tmp_path / f"seed{seed}/1-resnet8", "takd", seed, {"student0": 20.0}, **own)
        seen.append(seen_run(cd.Run(run)))
    # A run that now lies where its teacher did, and one whose place is no path, keep the place as it is.
    for seed, place in ((3, "."), (4, "x" * 5000)):
        where = tmp_path / f"seed{seed}"
        own = {"teacher": str(where / place), "weights": [], "init": None}
        seen.append(seen_run(cd.Run(write_run(where, "takd", seed, {"student0": 20.0}, **own))))
    assert [[each.seed for each in group.runs] for group in grouped(seen)] == [[0, 1], [2], [3], [4]]


def test_runs_of_a_method_that_is_not_registered_have_a_page(tmp_path, here):
    for seed in range(2):
        write_run(tmp_path / f"own/{seed}", "mine", seed, {"student0": 30.0}, own_method="Mine")
    assert main(["report", "own"]) == 0
    (group,) = grouped([seen_run(cd.Run(tmp_path / f"own/{seed}")) for seed in range(2)])
    assert [each.seed for each in group.runs] == [0, 1]


def test_runs_on_other_images_are_other_groups(tmp_path):
    seen = []
    for seed, (place, digest) in enumerate([("/a/birds", "0"), ("/b/birds", "0"), ("/a/cats", "1")]):
        run = write_run(tmp_path / str(seed), "dml", seed, {"student0": 30.0}, data_dir=place, test=digest)
        seen.append(seen_run(cd.Run(run)))
    groups = grouped(seen)
    assert [(group.name, len(group.runs)) for group in groups] == [("data_dir birds", 2), ("data_dir cats", 1)]
    named = [write_run(tmp_path / name, "dml", 0, {"student0": 1.0}, data=name, test=name) for name in ("c10", "c100")]
    groups = grouped([seen_run(cd.Run(run)) for run in named])
    assert [group.name for group in groups] == ["c10", "c100"]
    assert comparison_page(groups, tmp_path, "", ()).count("data_dir") == 0


def test_the_page_of_a_run_that_trains_on_has_nothing_of_its_earlier_end(folder, here, capsys):
    run = shutil.copytree(folder / "dml-0", here / "run")

    def stop(row):
        raise KeyError("enough")

    with pytest.raises(cd.CodistillError, match="on_epoch_end raised"):
        cd.resume(run, epochs=6, on_epoch_end=stop, show=False)
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    sections = set(re.findall(r'<h2 id="(\w+)"', page))
    assert {"predictors", "curves"} <= sections and not sections & {"wrong", "calibration", "disagreement", "attention"}
    assert "run/predictions.npz: " in page
    cd.resume(run, show=False)
    assert (run / "predictions.npz").exists() and main(["report", str(run)]) == 0
    assert '<h2 id="wrong"' in (run / "report.html").read_text(encoding="utf-8")


def test_a_folder_may_have_any_name(folder, here):
    name = os.fsdecode(b"nu\xff ?#")
    shutil.copytree(folder, here / name)
    assert main(["report", name, "--out", "page.html"]) == 0
    links = re.findall(r'href="([^"#]+report.html)"', (here / "page.html").read_text(encoding="utf-8"))
    assert len(links) == 3 and all(os.path.exists(unquote_to_bytes(each)) for each in links)


def test_a_run_folder_that_cannot_be_written_to_costs_the_pictures_alone(folder, here, monkeypatch, capsys):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", NAME)

    (folder / "mfef-1" / NAME).unlink()
    monkeypatch.setattr(pictures, "keep_pictures", refuse)
    assert main(["report", str(folder / "mfef-1"), "--out", "page.html"]) == 0 and Path("page.html").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{folder / 'mfef-1'}: its page has no pictures: Permission denied")


def test_the_best_epoch_is_that_of_the_summary(tmp_path):
    # Of a method with an initialisation, in which no epoch is the best.
    rows = [
        {"epoch": epoch, "test": {"student0": {"top1_error": error}}} for epoch, error in enumerate((50.0, 90.0, 80.0))
    ]
    assert Seen(None, {"best_epoch": 3}, rows).best == rows[2]
    assert Seen(None, {}, rows).best == rows[0]


def test_averages_and_exits_are_no_students_of_their_own(tmp_path):
    errors = {name: 20.0 for name in ("student0", "student0-ema", "student1", "student1/exit1", "ensemble")}
    seen = seen_run(cd.Run(write_run(tmp_path / "run", "l-mcl", 0, errors)))
    assert seen.students == ["student0", "student1"]
    found = {name: colour_of(name) for name in (*errors, "students", "fused", "hub")}
    assert found == {"student0": "c0", "student0-ema": "c0", "student1": "c1", "student1/exit1": "c1"} | {
        **{"ensemble": "ensemble", "students": "ink", "fused": "fused", "hub": "ink"},
    }


def test_several_runs_make_a_comparison(folder, here, capsys):
    runs = sorted(map(str, folder.glob("*-?")))
    assert main(["report", *runs]) == 0
    assert capsys.readouterr().out == "ok: comparison.html\n"
    page = (here / "comparison.html").read_text(encoding="utf-8")
    assert "<h1>2 ways to train on packed</h1>" in page and "fewer than three seeds" in page
    errors = [cd.Run(folder / f"mfef-{seed}").summary["top1_error"]["fused"] for seed in (0, 1)]
    assert f"{sum(errors) / 2:.2f} ± {abs(errors[0] - errors[1]) / 2**0.5:.2f}" in page
    assert page.count('class="band') >= 4
    assert (
        '<tr><th scope="row">method.name</th><td data-label="dml">dml</td><td data-label="mfef">mfef</td></tr>' in page
    )
    for link in re.findall(r'href="([^"#]+)"', page):
        assert link.startswith("data:") or (here / link).resolve().exists()
    assert main(["report", *runs]) == 0  # in its own place
    assert main(["report", str(folder)]) == 0  # of a folder of runs alone it lies there
    assert capsys.readouterr().out.endswith(f"ok: {folder / 'comparison.html'}\n")


def test_one_run_is_written_into_its_folder_and_its_pictures_are_made_again(folder, here, capsys):
    run = folder / "mfef-0"
    kept, page = (run / NAME).read_bytes(), (run / "report.html").read_bytes()
    for name in (NAME, "report.html"):
        (run / name).unlink()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_bytes() == page and (run / NAME).read_bytes() == kept
    assert main(["report", str(run), "--out", "page.html"]) == 0
    assert (here / "page.html").read_bytes() == page
    assert capsys.readouterr().err == ""


def test_data_that_has_gone_costs_the_pictures_alone(folder, here, capsys, tmp_path):
    (folder / "dml-0" / NAME).unlink()
    assert main(["report", str(folder / "dml-0"), "--data-dir", "gone.npz", "--out", "page.html"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"codistill: warning: {folder / 'dml-0'}: its page has no pictures: gone.npz")
    assert "Pictures: <code>codistill report" in (here / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["report"], 2, "codistill report: no run: name at least one run folder"),
        (["report", "gone"], 4, "gone/config.json: no such file; there is no such folder"),
        (
            ["report", "RUN", "--out", "notes.txt"],
            2,
            "notes.txt: is there, and not of codistill report: choose another --out",
        ),
        (
            ["report", "RUN", "--out", "gone/page.html"],
            2,
            "gone/page.html: No such file or directory: choose another --out",
        ),
        (
            ["report", "RUN", "OTHER", "--data-dir", "gone"],
            2,
            "codistill report: --data-dir and --skip-bad are for the page of one run: leave them out",
        ),
        (["report", "RUN", "--out", "."], 2, ".: is there, and not of codistill report: choose another --out"),
    ],
)
def test_what_cannot_be_is_one_line(folder, here, capsys, arguments, status, line):
    (here / "notes.txt").write_text("mine")
    places = {"RUN": str(folder / "mfef-1"), "OTHER": str(folder / "dml-0")}
    assert main([places.get(each, each) for each in arguments]) == status
    assert capsys.readouterr().err == f"codistill: error: {line}\n"
    assert (here / "notes.txt").read_text() == "mine" and {each.name for each in here.iterdir()} == {"notes.txt"}
