"""Interrupted runs go on with the same bits; what kills and damages them is in tests/faults/test_resuming.py."""

import dataclasses
import json
import math
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import codistill as cd
from codistill.cli import main
from codistill.core.errors import CheckpointError, UsageError
from codistill.core.randomness import STEP_STREAM, stream_seed
from codistill.data.augment import DeviceImages
from codistill.report.page import write_report
from codistill.settings.config import default_config
from codistill.training import resume as resuming
from codistill.training import trainer as loop
from codistill.training.capture import EagerSteps
from codistill.training.ranks import Ranks
from codistill.training.resume import resume, resume_together
from codistill.training.trial import IMAGES
from codistill.training.verify import end_state as end_digest
from codistill.training.verify import in_pairs

from .. import tiny
from ..faults.running import arguments, at_step, end_state, run_here

pytestmark = pytest.mark.usefixtures("tiny_registered", "no_pages")


STUDENTS = {"takd": 1}  # several networks are a chain


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> str:
    return str(tiny.write_npz(tmp_path_factory.mktemp("resume") / "colours.npz", tiny.data(train=20, test=21)))


def stopped(colours: str, out: Path, step: int, *more: str, method: str = "mfef") -> Path:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda _: signal.raise_signal(signal.SIGTERM))
        assert run_here(arguments(colours, out, *more, method=method)) == 143
    return out


@pytest.fixture(scope="module")
def teacher(colours, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    with tiny.registered(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_report", lambda *arguments: None)
        patch.setattr(loop, "keep_pictures", lambda *arguments: None)
        assert run_here(arguments(colours, out, method="independent")) == 0
    return out


# Within the first epoch of three steps, at its end, at the border of two stages, and within the second one.
@pytest.mark.parametrize(
    ("method", "step"),
    dict.fromkeys(
        [(method, (2, 3, 4, 6)[number % 4]) for number, method in enumerate(cd.METHODS)]
        + [("mfef", 2), ("mfef", 6), *(("okdph", step) for step in (2, 3, 4, 6))]
    ),
)
def test_summary_and_metrics_are_those_of_an_undisturbed_run(colours, teacher, tmp_path, monkeypatch, method, step):
    monkeypatch.setattr(loop, "keep_pictures", lambda *arguments: None)
    more = ("--networks", *["tiny"] * STUDENTS.get(method, max(2, cd.METHODS[method].min_students)))
    more += ("--teacher", str(teacher)) if cd.METHODS[method].teacher == "required" else ()
    assert run_here(arguments(colours, tmp_path / "whole", *more, method=method)) == 0
    broken = resume(stopped(colours, tmp_path / "broken", step, *more, method=method), show=False)
    assert end_state(tmp_path / "broken") == end_state(tmp_path / "whole")
    whole = cd.Run(tmp_path / "whole").summary
    assert tiny.untimed(broken.summary) == tiny.untimed(whole)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("okd-cheap", ("--networks", "resnet8:conv=shift", "resnet8:conv=group,groups=2")),
        *(("mfef", ("--method.multiscale", each)) for each in ("psa", "aspp")),
    ],
    ids=["cheap", "psa", "aspp"],
)
def test_cheap_convolutions_and_multi_scale_blocks_resume_exactly(colours, tmp_path, method, more):
    assert run_here(arguments(colours, tmp_path / "whole", *more, method=method)) == 0
    resume(stopped(colours, tmp_path / "broken", 4, *more, method=method), show=False)
    assert end_state(tmp_path / "broken") == end_state(tmp_path / "whole")


@pytest.mark.fault(96)
@pytest.mark.parametrize("step", [1, 3, 5])
def test_what_a_network_draws_is_drawn_again(colours, tmp_path, step):
    drawing = ("--networks", "drawing", "drawing", "--validation", "2")
    assert run_here(arguments(colours, tmp_path / "whole", *drawing, method="dml")) == 0
    broken = stopped(colours, tmp_path / "broken", step, *drawing, method="dml")
    torch.rand(step), random.random(), np.random.uniform()  # another place of each generator
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    resume(broken, show=False)
    assert end_state(broken) == end_state(tmp_path / "whole")
    # They are the user's, and where he left them.
    assert torch.equal(torch.get_rng_state(), states[0])
    assert [random.getstate(), np.random.get_state()[1].tolist()] == list(states[1:])


@pytest.mark.fault(96)
def test_seeds_steps_and_ranks_draw_otherwise(colours, tmp_path):
    config = dataclasses.replace(default_config("dml"), networks=("drawing", "drawing"))

    def seeds(seed: int, rank: int) -> list[int]:
        train = dataclasses.replace(config.train, seed=seed)
        held = SimpleNamespace(config=dataclasses.replace(config, train=train))
        held.step = SimpleNamespace(ranks=Ranks(rank, 2))
        return [loop.Trainer.draws_seed(held, epoch, number) for epoch in range(2) for number in (1, 2)]

    drawn = [each for seed in (0, 1) for rank in (0, 1) for each in seeds(seed, rank)]
    assert len(set(drawn)) == len(drawn) == 16


def test_the_speed_of_an_epoch_that_was_interrupted_is_that_of_the_images_after(colours, tmp_path):
    run = resume(stopped(colours, tmp_path / "run", 4), show=False)  # one step of eight images into the second epoch
    rows = run.metrics()
    assert [row["images_per_second"] * row["seconds"] for row in rows] == pytest.approx([20, 12])


@pytest.mark.fault(96)
def test_each_step_draws_by_its_seed(colours, tmp_path, monkeypatch):
    seen, call = [], EagerSteps.__call__

    def noted(self, batches, progress, seeds):
        seen.extend(seeds)
        return call(self, batches, progress, seeds)

    monkeypatch.setattr(EagerSteps, "__call__", noted)
    assert run_here(arguments(colours, tmp_path / "run", "--seed", "3")) == 0
    assert seen == [stream_seed(3, STEP_STREAM, epoch, number, 0) for epoch in (0, 1) for number in (1, 2, 3)]


@pytest.mark.fault(96)
def test_a_network_that_draws_in_evaluation_scores_as_in_training(colours, tmp_path):
    drawing = ("--networks", "drawing", "drawing", "--seed", "1")
    assert run_here(arguments(colours, tmp_path / "run", *drawing, method="dml")) == 0
    run = cd.Run(tmp_path / "run")
    scores = {name: dataclasses.asdict(each) for name, each in run.evaluate(device="cpu").items()}
    assert scores == run.metrics()[-1]["test"]


def test_with_a_teacher_and_validation_images(colours, tmp_path):
    assert run_here(arguments(colours, tmp_path / "teacher", method="independent")) == 0
    more = ("--teacher", str(tmp_path / "teacher"), "--validation", "4", "--evaluate-every", "2")
    assert run_here(arguments(colours, tmp_path / "whole", *more, method="kd")) == 0
    resume(stopped(colours, tmp_path / "broken", 3, *more, method="kd"), show=False)
    assert end_state(tmp_path / "broken") == end_state(tmp_path / "whole")


def test_a_teacher_that_is_handed_in_teaches_as_then(tmp_path):
    def taught(**settings):
        return cd.WithTeacher(tiny.method(cd.KD, students=1), tiny.own_students(1)[0], **settings)

    data, out = tiny.data(), tmp_path / "run"
    run = cd.train(taught(train="head"), data, out=out, settings=tiny.settings(epochs=1), show=False)
    assert run.metadata["initial_weights"]["trained_in"] == []
    with pytest.raises(UsageError, match=r"has teacher_weight 5.0, but the run began with 1.0: attach it as then"):
        cd.resume(out, epochs=2, data=data, method=taught(train="head", weight=5), show=False)
    longer = cd.resume(out, epochs=2, data=data, method=taught(train="head"), show=False)
    assert longer.config.train.epochs == 2 and longer.extensions[0]["epochs"] == 1
    for call, words in (
        (lambda: longer.evaluate("lastt"), "checkpoint 'lastt': take last or best"),
        (lambda: longer.evaluate(split="train"), "split is 'train': take test or validation"),
        (lambda: cd.train(data, data), "train: method is a Dataset; it must be a codistill.Method"),
    ):
        with pytest.raises(UsageError, match=words):
            call()


def test_augmentation_from_python_is_that_of_the_run(tmp_path):
    chosen = cd.AugmentSettings(mixup=0.2, class_weights="balanced")
    settings = tiny.settings(epochs=1)
    run = cd.train(
        tiny.method(cd.DML), tiny.data(), out=tmp_path / "run", settings=settings, augment=chosen, show=False
    )
    assert run.config.augment == chosen and (run.metadata["mixup"], run.metadata["class_weights"]) == (0.2, "balanced")


# Stopped in the second of two epochs, or in the first, which may be the initialisation.
@pytest.mark.parametrize(
    ("method", "step", "more"),
    [
        ("fitnets", 5, ()),
        ("fitnets", 2, ("--method.initial-share", "0.5")),
        ("at", 5, ("--method.kl-weight", "1")),
        ("cd", 5, ("--method.decay", "0.9", "--method.silent-share", "0.3")),
        ("fsp", 2, ()),
        ("ab", 2, ()),
    ],
)
def test_offline_methods(colours, tmp_path, method, step, more):
    assert run_here(arguments(colours, tmp_path / "teacher", method="independent")) == 0
    taught = ("--teacher", str(tmp_path / "teacher"), *more)
    assert run_here(arguments(colours, tmp_path / "whole", *taught, method=method)) == 0
    resume(stopped(colours, tmp_path / "broken", step, *taught, method=method), show=False)
    assert end_state(tmp_path / "broken") == end_state(tmp_path / "whole")


def test_runs_that_stopped_at_different_steps(colours, tmp_path):
    outs = [stopped(colours, tmp_path / f"run{step}", step) for step in (2, 5)]
    assert run_here(arguments(colours, tmp_path / "whole")) == 0
    runs = resume_together(outs, show=False)
    assert [run.path for run in runs] == outs
    for out in outs:
        assert end_state(out) == end_state(tmp_path / "whole")


def test_runs_that_go_on_side_by_side_have_one_copy_of_their_images(colours, tmp_path, monkeypatch):
    outs = [stopped(colours, tmp_path / f"seed{seed}", 2, "--seed", str(seed)) for seed in (0, 1)]
    made, build = [], DeviceImages.__init__
    monkeypatch.setattr(DeviceImages, "__init__", lambda self, *rest: made.append((rest[0], build(self, *rest))))
    resume_together(outs, show=False)
    assert len([split for split, _ in made if len(split) > IMAGES]) == 2  # training and test; the others are of trials


@pytest.mark.parametrize("step", [2, 5])
def test_one_that_diverges_does_not_cost_those_that_go_on_after_it(colours, tmp_path, monkeypatch, capsys, step):
    outs = [stopped(colours, tmp_path / "bad", step), stopped(colours, tmp_path / "good", 2)]
    assert run_here(arguments(colours, tmp_path / "whole")) == 0
    bad, losses = [], cd.MFEF.losses

    def poisoned(self, *arguments):
        if len(arguments[1]) > IMAGES:  # not a trial
            bad[:] = bad or [self]
        factor = math.nan if bad and self is bad[0] else 1
        return {name: term * factor for name, term in losses(self, *arguments).items()}

    monkeypatch.setattr(cd.MFEF, "losses", poisoned)
    capsys.readouterr()
    assert run_here(["resume", *map(str, outs)]) == 5
    line = f"codistill: error: 1 of 2 runs diverged: {outs[0]}; the others are finished"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert cd.Run(outs[0]).status == "diverged" and end_state(outs[1]) == end_state(tmp_path / "whole")


def test_what_is_printed_goes_on_where_it_stopped(colours, tmp_path, capsys):
    out = stopped(colours, tmp_path / "run", 5)
    capsys.readouterr()
    assert run_here(["resume", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch 2/2") and f"run folder: {out}" in lines


def test_a_run_that_is_stopped_before_its_page_is_written_gets_it(colours, tmp_path, monkeypatch):
    def stopping(run, summary):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write_report", stopping)
    assert run_here(arguments(colours, tmp_path / "run")) == 130
    run = cd.Run(tmp_path / "run")
    assert not run.finished
    monkeypatch.setattr(loop, "write_report", write_report)
    assert run_here(["resume", str(run.path)]) == 0
    assert cd.Run(run.path).finished and "</html>" in (run.path / "report.html").read_text()
    assert run_here(arguments(colours, tmp_path / "whole")) == 0
    assert end_state(run.path) == end_state(tmp_path / "whole")


def test_resume_of_nothing(capsys):
    assert main(["resume"]) == 2
    assert capsys.readouterr().err == "codistill: error: codistill resume: no run: name at least one run folder\n"


def test_refusals(colours, tmp_path, capsys):
    assert run_here(arguments(colours, tmp_path / "run")) == 0
    before = tiny.listing(tmp_path / "run")
    with pytest.raises(UsageError, match="is finished"):
        resume(tmp_path / "run", show=False)
    assert tiny.listing(tmp_path / "run") == before
    with pytest.raises(CheckpointError, match=r"no such folder"):
        resume(tmp_path / "nothing", show=False)


@pytest.mark.parametrize("more", [("--validation", "4"), ("--seeds", "0", "1", "2")], ids=["one run", "fleet"])
def test_the_host_waits_once_an_epoch(colours, tmp_path, monkeypatch, more):
    # On a GPU terms are not shown inside an epoch.
    monkeypatch.setattr(loop.TrainingDisplay, "due", lambda self: False)
    counts = []
    for epochs in (1, 4):
        with tiny.HostReads() as reads:
            assert run_here([*arguments(colours, tmp_path / str(epochs)), "--epochs", str(epochs), *more]) == 0
        counts.append(len(reads.found))
    assert counts[1] - counts[0] == 3


@pytest.mark.gpu
@pytest.mark.parametrize("chosen", [True, False])
def test_deterministic_algorithms_are_asked_of_torch(colours, tmp_path, monkeypatch, chosen):
    seen = []
    at_step(monkeypatch, 1, lambda _: seen.append(torch.are_deterministic_algorithms_enabled()))
    more = ("--device", "cuda", *["--deterministic"] * chosen)
    try:
        assert run_here(arguments(colours, tmp_path / "run", *more)) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [chosen]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "more", [(), pytest.param(("--seeds", "0", "1"), marks=pytest.mark.slow)], ids=["one run", "fleet"]
)
@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 8, pytest.param(13, marks=pytest.mark.slow)])
def test_captured_steps_go_on_with_the_same_bits(colours, tmp_path, step, more):
    # Eight steps an epoch: three plain ones, then the graph; and a last batch of another size.
    flags = ("--device", "cuda", "--deterministic", "-b", "3", "--epochs", "2", *more)
    outs = [tmp_path / name for name in ("whole", "broken")]
    assert run_here(arguments(colours, outs[0], *flags)) == 0
    with pytest.MonkeyPatch.context() as patch:
        count = iter(range(1, 1000))
        after = loop.Trainer.after_step

        def stopping(self, epoch, number):
            after(self, epoch, number)
            if next(count) == step:
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(loop.Trainer, "after_step", stopping)
        assert run_here(arguments(colours, outs[1], *flags)) == 143
    assert run_here(["resume", str(outs[1])]) == 0
    for name in ("seed0", "seed1") if more else (".",):
        assert end_state(outs[1] / name) == end_state(outs[0] / name)


# --- codistill train --verify-resume ---


@pytest.mark.fault(86)
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("mfef", ()),
        ("kdcl", ()),
        ("dml", ("--batch-size", "64")),
        ("dml", ("--batch-size", "9", "--drop-last")),  # two batches, and a part of a third
        ("dml", ("--batch-size", "10", "--sampling", "class-pairs")),
    ],
)
def test_verify_resume(colours, tmp_path, capsys, method, more):
    out = tmp_path / "run"
    assert run_here(arguments(colours, out, "--verify-resume", "--milestones", "1", *more, method=method)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("resume verified: 3 breaks in 6 steps change no bit of ")
    assert cd.Run(out).summary["status"] == "finished"


@pytest.mark.parametrize("more", [[], ["--sampling", "class-pairs"]], ids=["shuffled", "pairs"])
def test_verify_resume_with_images_in_files(tmp_path, capsys, no_pages, more):
    data = tiny.data()
    for name, split in (("train", data.train), ("test", data.test)):
        for number, (pixels, label) in enumerate(zip(split.images, split.labels, strict=True)):
            path = tmp_path / "photos" / name / data.class_names[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    flags = ["--networks", "tiny", "tiny", "--batch-size", "8", "--epochs", "1", "--threads", "1", "--verify-resume"]
    folder = ["--data", "folder", "--data-dir", str(tmp_path / "photos"), "--out", str(tmp_path / "run")]
    assert run_here(["train", "dml", *flags, *folder, *more]) == 0
    assert capsys.readouterr().out.startswith("resume verified: 3 breaks in 6 steps change no bit of ")


def test_a_run_that_another_process_continued_is_not_written_over(colours, tmp_path, capsys, monkeypatch):
    out = stopped(colours, tmp_path / "run", 2)
    share, before = resuming.share_cores, []

    def meanwhile(*arguments):
        monkeypatch.setattr(resuming, "share_cores", share)
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 3, lambda _: signal.raise_signal(signal.SIGTERM))
            assert run_here(["resume", str(out)]) == 143
        before.append(tiny.listing(out))
        return share(*arguments)

    monkeypatch.setattr(resuming, "share_cores", meanwhile)
    capsys.readouterr()
    assert run_here(["resume", str(out), "--epochs", "4"]) == 2
    assert "was continued by another process meanwhile: repeat the command\n" in capsys.readouterr().err
    assert {**tiny.listing(out), ".lock": None} == {**before[0], ".lock": None}
    assert run_here(["resume", str(out)]) == 0


def test_a_damaged_checkpoint_takes_no_place_of_a_whole_one(colours, tmp_path):
    out = stopped(colours, tmp_path / "run", 5)
    store = cd.Run(out).checkpoints
    (whole, damaged) = store.entries()[-2:]
    assert (damaged["epoch"], damaged["step"]) > (whole["epoch"], whole["step"])
    (store.folder / damaged["file"]).write_bytes(b"damaged")
    resume(out, show=False)
    files = [each["file"] for each in cd.Run(out).checkpoints.entries()]
    assert damaged["file"] not in files and whole["file"] in files and len(files) >= 2


def test_a_run_that_is_named_twice_resumes_once(colours, tmp_path, monkeypatch, capsys):
    out = stopped(colours, tmp_path / "run", 2)
    monkeypatch.chdir(tmp_path)
    assert run_here(["resume", "run", str(out)]) == 0
    assert cd.Run(out).finished


def test_images_in_pairs_of_a_class():
    assert in_pairs(np.array([0, 1, 0, 2, 1, 0])).tolist() == [0, 2, 1, 4]


def test_verify_resume_finds_what_is_not_restored(colours, tmp_path, capsys, monkeypatch):
    restore = loop.Trainer.restore

    def forgetful(self, state):
        restore(self, dataclasses.replace(state, momentum=[each * 0 for each in state.momentum]))

    monkeypatch.setattr(loop.Trainer, "restore", forgetful)
    assert main(arguments(colours, tmp_path / "run", "--verify-resume")) == 4
    error = capsys.readouterr().err
    assert error.startswith("codistill: error: resume is not bit for bit here: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_verify_resume_looks_at_the_metrics_too(colours, tmp_path, capsys, monkeypatch):
    restore = loop.Trainer.restore

    def forgetful(self, state):
        restore(self, state)
        self.step.sums.sums[:1] += 1

    monkeypatch.setattr(loop.Trainer, "restore", forgetful)
    assert main(arguments(colours, tmp_path / "run", "--verify-resume")) == 4
    assert "metrics do" in capsys.readouterr().err


def test_a_folder_of_runs_leaves_out_those_that_ended(colours, tmp_path):
    outs = [stopped(colours, tmp_path / f"runs/{name}", 2) for name in ("a", "b")]
    summary = json.loads((outs[0] / "summary.json").read_text())
    (outs[0] / "summary.json").write_text(json.dumps({**summary, "status": "diverged"}))
    assert [run.path for run in resume_together([tmp_path / "runs"], show=False)] == outs[1:]
    with pytest.raises(UsageError, match=r"all 2 runs in .* are finished or diverged"):
        resume_together([tmp_path / "runs"], show=False)


def test_while_it_goes_on_a_run_does_not_say_how_it_ended(colours, tmp_path):
    out = stopped(colours, tmp_path / "run", 2)
    assert cd.Run(out).status == "interrupted"
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 1, lambda _: seen.append(cd.Run(out).status))
        resume(out, show=False)
    assert seen == [None] and cd.Run(out).status == "finished"


def test_the_digest_of_an_end_sees_each_part(colours, tmp_path):
    assert run_here(arguments(colours, tmp_path / "run")) == 0
    run = cd.Run(tmp_path / "run")
    state, rows = run.checkpoints.load(), run.metrics()
    found = {end_digest(run)}
    for part in ({"rows": [*rows, {}]}, {"step": 1}, {"momentum": [each + 1 for each in state.momentum]}):
        run.checkpoints.save(dataclasses.replace(state, **part))
        found.add(end_digest(run))
    for name in ("cohort.students.0.head.linear.bias", "cohort.students.1.stages.2.1.running_mean"):
        run.checkpoints.save(dataclasses.replace(state, method={**state.method, name: state.method[name] + 1}))
        found.add(end_digest(run))
    rows[0]["train"]["loss"] += 1
    run.write_metrics(rows)
    found.add(end_digest(run))
    assert len(found) == 7
    rows[0]["seconds"] += 1
    run.write_metrics(rows)
    assert end_digest(run) in found


def test_a_checkpoint_may_lack_settings_that_are_newer_than_it(colours, tmp_path):
    assert run_here(arguments(colours, tmp_path / "whole")) == 0
    old = stopped(colours, tmp_path / "old", 2)
    metadata = json.loads((old / "config.json").read_text())
    checkpoints = cd.Run(old).checkpoints
    state = checkpoints.load()
    config = dict(state.config)
    for key in ("evaluate_every", "evaluation_precision"):
        del metadata[key], config[key]
    (old / "config.json").write_text(json.dumps(metadata))
    checkpoints.save(dataclasses.replace(state, config=config))
    resume(old, show=False)
    assert end_state(old) == end_state(tmp_path / "whole")
