"""Images that are read from their file during training: the same run, bit for bit, as with images in memory."""

import dataclasses
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import codistill as cd
from codistill.core.errors import DataError, ResourceError, UsageError
from codistill.data import stream
from codistill.data.augment import Augmentation, DeviceImages, epoch_indices
from codistill.data.stream import StreamedImages, on_device
from codistill.training.resume import resume

from .. import tiny
from ..faults.running import arguments, at_step, end_state, evaluate_in_batches, run_here
from .rank_program import forked, program

pytestmark = pytest.mark.usefixtures("tiny_registered", "no_pages")

CPU = torch.device("cpu")
STATISTICS = ((0.5,) * 3, (0.25,) * 3)


def mapped(split: cd.Split, path: Path) -> cd.Split:
    np.save(path, split.images)
    return cd.Split(np.load(path, mmap_mode="r"), split.labels, split.files)


def mapped_data(data: cd.Dataset, folder: Path) -> cd.Dataset:
    parts = {part: mapped(getattr(data, part), folder / f"{part}.npy") for part in ("train", "test")}
    return dataclasses.replace(data, **parts)


def test_a_memory_map_stays_one_and_has_the_facts_of_its_array(tmp_path):
    data = tiny.data()
    other = mapped_data(data, tmp_path)
    assert isinstance(other.train.images, np.memmap)
    assert other.statistics == data.statistics


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("used", [None, [3, 8, 1, 12, 5, 6, 19]])
def test_batches_are_those_of_images_in_memory(tmp_path, used, views):
    split, augmentation = tiny.split(20, 0), Augmentation(padding=2)
    memory, streamed = (
        on_device(each, STATISTICS, CPU, "on") for each in (split, mapped(split, tmp_path / "images.npy"))
    )
    assert type(memory) is DeviceImages and type(streamed) is StreamedImages
    if used is not None:
        memory, streamed = (each.subset(torch.tensor(used)) for each in (memory, streamed))
    images = len(memory)
    assert len(streamed) == images
    steps = [(start, min(start + 3, images)) for start in range(0, images, 3)]
    place, before = streamed.for_steps(3), None
    for epoch in range(2):
        indices = epoch_indices(images if used is None else memory.positions, 0, epoch, augmentation, CPU, views)
        batches = zip(memory.for_steps(3).staged(indices, steps), place.staged(indices, steps), strict=True)
        for ours, theirs in batches:
            wanted, found = (each.augmented(part, augmentation) for each, part in ((memory, ours), (place, theirs)))
            assert torch.equal(wanted[0], found[0]) and torch.equal(wanted[1], found[1])
        assert before in (None, place.images.data_ptr())  # a captured step reads it there
        before = place.images.data_ptr()
    for ours, theirs in zip(memory.batches(4), streamed.batches(4), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert torch.equal(memory.batch(2, 5)[0], streamed.batch(2, 5)[0])


def test_images_are_streamed_where_they_would_fill_memory(tmp_path, monkeypatch, capsys):
    split = mapped(tiny.split(20, 0), tmp_path / "images.npy")
    size = split.images.nbytes
    monkeypatch.setattr(stream, "free_on", lambda device: 2 * size)
    assert not on_device(split, STATISTICS, CPU).streams and capsys.readouterr().err == ""
    monkeypatch.setattr(stream, "free_on", lambda device: 2 * size - 1)
    assert on_device(split, STATISTICS, CPU).streams
    assert "they are read from the file of decoded images during training (--stream)" in capsys.readouterr().err
    assert not on_device(split, STATISTICS, CPU, "off").streams
    monkeypatch.setattr(stream, "free_on", lambda device: size - 1)
    with pytest.raises(ResourceError, match="with --stream on they are read during training"):
        on_device(split, STATISTICS, CPU, "off")


@pytest.mark.fault(151)
def test_what_has_no_file_is_not_streamed(tmp_path):
    data = tiny.write_npz(tmp_path / "colours.npz", tiny.data())
    assert run_here(arguments(str(data), tmp_path / "run", "--stream", "on")) == 2
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="is in memory, and has no file to stream it from: leave out --stream on"):
        stream.check_streaming(tiny.data(), "on")


@pytest.mark.fault(152)
def test_a_file_that_is_cut_is_one_line(tmp_path):
    split = mapped(tiny.split(20, 0), tmp_path / "images.npy")
    streamed = on_device(split, STATISTICS, CPU, "on")
    with open(tmp_path / "images.npy", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(DataError, match=r"images\.npy: cannot be read \(the file was cut\): start again"):
        list(streamed.batches(5))
    (tmp_path / "images.npy").unlink()
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\)"):
        on_device(split, STATISTICS, CPU, "on")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root, data = tmp_path_factory.mktemp("streaming") / "photos", tiny.data(train=20, test=21)
    for part in ("train", "test"):
        split = getattr(data, part)
        for index, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            path = root / part / data.class_names[label] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


def command(photos: Path, out: Path, *more: str, method: str = "mfef") -> list[str]:
    line = arguments(str(photos), out, "--data-cache", str(photos.parent / "cache"), *more, method=method)
    return ["folder" if each == "packed" else each for each in line]


@pytest.mark.fault(152)
def test_a_file_that_is_cut_during_training_is_status_3(photos, tmp_path, capsys, monkeypatch):
    own = shutil.copytree(photos, tmp_path / "photos")
    cut = []

    def cutting(step):
        for file in (tmp_path / "cache").rglob("pixels"):
            with open(file, "r+b") as opened:
                opened.truncate(200)
            cut.append(file)

    at_step(monkeypatch, 2, cutting)
    assert run_here(command(own, tmp_path / "run", "--stream", "on")) == 3
    said = capsys.readouterr().err.splitlines()
    assert len(cut) == 2 and "pixels: cannot be read (the file was cut): start again" in said[-1]


@pytest.mark.fault(152)
@pytest.mark.parametrize("method", ["mfef", pytest.param("kdcl", marks=pytest.mark.slow)])
def test_a_streamed_run_is_the_run_in_memory(photos, tmp_path, monkeypatch, method):
    evaluate_in_batches(monkeypatch, 8)
    for out, how in (("memory", "off"), ("streamed", "on")):
        assert run_here(command(photos, tmp_path / out, "--stream", how, "--validation", "5", method=method)) == 0
    assert end_state(tmp_path / "streamed") == end_state(tmp_path / "memory")


MIXED = ["--mixup", "0.4", "--cutmix", "1.0", "--sampling", "balanced", "--auto-augment", "randaugment"]


@pytest.mark.parametrize("mixed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_streamed_ranks_end_as_those_with_images_in_memory(photos, tmp_path, mixed):
    for out, how in (("memory", "off"), ("streamed", "on")):
        line = command(photos, tmp_path / out, "--stream", how, *(MIXED if mixed else []), method="dml")
        assert forked(lambda line=line: program(line)) == [0, 0]
    assert end_state(tmp_path / "streamed") == end_state(tmp_path / "memory")


def test_streamed_runs_side_by_side_end_as_those_alone_in_memory(photos, tmp_path):
    assert run_here(command(photos, tmp_path / "several", "--stream", "on", *MIXED, "--seeds", "0", "1")) == 0
    assert run_here(command(photos, tmp_path / "alone", "--stream", "off", *MIXED, "--seed", "1")) == 0
    assert end_state(tmp_path / "several" / "seed1") == end_state(tmp_path / "alone")


@pytest.mark.fault(152)
@pytest.mark.parametrize("step", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_a_streamed_run_goes_on_with_the_same_bits(photos, tmp_path, step):
    pairs = ("--sampling", "class-pairs")
    assert run_here(command(photos, tmp_path / "whole", "--stream", "off", *pairs)) == 0
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda _: signal.raise_signal(signal.SIGTERM))
        assert run_here(command(photos, tmp_path / "broken", "--stream", "on", *pairs)) == 143
    resume(tmp_path / "broken", show=False)
    assert end_state(tmp_path / "broken") == end_state(tmp_path / "whole")


@pytest.mark.fault(152)
@pytest.mark.slow
@pytest.mark.gpu
def test_a_captured_step_reads_streamed_batches(tmp_path):
    data, ends = tiny.data(train=52), []
    for how, each in (("off", data), ("on", mapped_data(data, tmp_path))):
        settings, execution = tiny.both_settings(device="cuda", stream=how, deterministic=True)
        run = cd.train(tiny.method(), each, settings=settings, execution=execution, out=tmp_path / how, show=False)
        ends.append(end_state(run.path))
    assert ends[0] == ends[1]
