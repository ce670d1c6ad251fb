"""Runs that stop early, are extended, start from others, and call a function of their user after each epoch."""

import json
import signal

import pytest
import torch

import codistill as cd
from codistill.core.errors import UsageError
from codistill.deploy.card import protocol, training_words
from codistill.networks import PooledLinear
from codistill.training import initial
from codistill.training import trainer as loop
from codistill.training.resume import resume, resume_together
from codistill.training.step import TrainStep

from .. import tiny
from ..faults.running import arguments, at_step, end_state, run_here

pytestmark = pytest.mark.usefixtures("tiny_registered", "no_pages")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop, "keep_pictures", lambda *arguments: None, raising=False)


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> str:
    return str(tiny.write_npz(tmp_path_factory.mktemp("going-on") / "colours.npz", tiny.data(train=20, test=21)))


def stopped(colours, out, step, *more, method="mfef"):
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda _: signal.raise_signal(signal.SIGTERM))
        assert run_here(arguments(colours, out, *more, method=method)) == 143
    return out


# --- early stopping ---

# Nothing is learned at this rate: the first epoch stays the best.
PATIENT = ("--lr", "1e-9", "--epochs", "9", "--validation", "4")


def test_a_run_stops_when_its_patience_is_over(colours, tmp_path, capsys):
    assert run_here(arguments(colours, tmp_path / "run", *PATIENT, "--patience", "2")) == 0
    run = cd.Run(tmp_path / "run")
    assert run.finished and len(run.metrics()) == 3
    assert (run.summary["stopped_early"], run.summary["epochs"], run.summary["best_epoch"]) == (3, 9, 1)
    assert "Weights of epoch 3 of 9" in protocol(run, "last", run.load_data()) and ", 3 epochs," in training_words(run)
    line = "stopped after epoch 3 of 9: no lower validation error in 2 evaluations since epoch 1"
    assert line in capsys.readouterr().out
    assert run_here(["resume", str(run.path), "--epochs", "12"]) == 0  # its patience begins anew
    assert len(cd.Run(run.path).metrics()) == 5
    assert run_here(arguments(colours, tmp_path / "seldom", *PATIENT, "--patience", "2", "--evaluate-every", "2")) == 0
    assert len(cd.Run(tmp_path / "seldom").metrics()) == 6


@pytest.mark.slow
def test_an_interrupted_run_stops_where_it_would_have(colours, tmp_path):
    flags = (*PATIENT, "--patience", "1")
    assert run_here(arguments(colours, tmp_path / "whole", *flags)) == 0
    resume(stopped(colours, tmp_path / "broken", 3, *flags), show=False)
    assert end_state(tmp_path / "broken") == end_state(tmp_path / "whole")
    # Stopped after its last epoch, before its summary.
    (tmp_path / "whole" / "summary.json").unlink()
    assert len(resume(tmp_path / "whole", show=False).metrics()) == 2


@pytest.mark.slow
def test_of_runs_side_by_side_each_stops_by_itself(colours, tmp_path):
    flags = ("--epochs", "4", "--validation", "4", "--patience", "1")
    assert run_here(arguments(colours, tmp_path / "both", *flags, "--seeds", "0", "1")) == 0
    for seed in (0, 1):
        assert run_here(arguments(colours, tmp_path / f"alone{seed}", *flags, "--seed", str(seed))) == 0
        assert end_state(tmp_path / f"both/seed{seed}") == end_state(tmp_path / f"alone{seed}")


@pytest.mark.parametrize("first", [0, 1])
def test_a_run_that_is_over_before_the_others_is_finished_then(colours, tmp_path, capsys, monkeypatch, first):
    for seed in (0, 1):  # nothing is learned at this rate
        settings = {"seed": seed, "learning_rate": 1e-9, "patience": 3 if seed == first else 0}
        (tmp_path / f"r{seed}.json").write_text(json.dumps(settings))
    out = tmp_path / "both"
    over, other = out / f"r{first}", out / f"r{1 - first}"
    call = TrainStep.__call__

    def stepping(self, *given):
        if (over / "summary.json").exists():
            signal.raise_signal(signal.SIGTERM)
        call(self, *given)

    monkeypatch.setattr(TrainStep, "__call__", stepping)
    flags = ["--networks", "tiny", "tiny", "--data", "packed", "--data-dir", colours, "-b", "8", "--threads", "1"]
    recipes = ["--recipes", str(tmp_path / "r0.json"), str(tmp_path / "r1.json")]
    line = ["train", *flags, "--epochs", "9", "--validation", "4", *recipes, "--out", str(out)]
    assert run_here(line) == 143
    assert cd.Run(over).finished and cd.Run(over).summary["stopped_early"] == 4
    assert len(cd.Run(other).metrics()) == 4 and not cd.Run(other).finished
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"codistill resume {other}")
    monkeypatch.undo()
    assert run_here(["resume", str(out)]) == 0 and cd.Run(other).finished


def test_patience_needs_images_that_are_held_out(colours, tmp_path, capsys):
    assert run_here(arguments(colours, tmp_path / "run", "--patience", "2")) == 2
    words = "patience is 2, but no images are held out to stop by: --validation 20%, or leave it out"
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


# --- more epochs ---

FIXED = ("--milestones", "1", "--ema-decay", "0.9", "--clip-norm", "1")  # functions of the epoch alone


def test_an_extended_run_is_one_of_so_many_epochs_where_nothing_depends_on_them(colours, tmp_path, capsys):
    flags = {"method": "independent"}
    assert run_here(arguments(colours, tmp_path / "long", *FIXED, "--epochs", "4", **flags)) == 0
    assert run_here(arguments(colours, tmp_path / "short", *FIXED, **flags)) == 0
    capsys.readouterr()
    assert run_here(["resume", str(tmp_path / "short"), "--epochs", "4"]) == 0
    line = "4 epochs instead of 2, of which 2 are done: it goes on as a run of 4, from 50 %: learning rate 0.005"
    assert line in capsys.readouterr().err
    assert end_state(tmp_path / "short") == end_state(tmp_path / "long")
    run = cd.Run(tmp_path / "short")
    assert run.finished and run.config.train.epochs == run.summary["epochs"] == 4
    assert run.metadata["extended"] == [{"epochs": 2, "after_epoch": 2, "after_step": 0}]


@pytest.mark.slow
@pytest.mark.parametrize("breaks", [[2], [1, 2, 3]])
def test_an_extension_that_is_interrupted_goes_on_with_the_same_bits(colours, tmp_path, breaks):
    for name in ("whole", "broken"):
        stopped(colours, tmp_path / name, 2)  # inside the first epoch
    whole = resume(tmp_path / "whole", epochs=4, show=False)
    # The ramp-up and the milestones are those of four epochs from here on.
    assert [row["learning_rate"] for row in whole.metrics()] == pytest.approx([0.05, 0.05, 0.005, 0.0005])
    for number in breaks:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, number, lambda _: signal.raise_signal(signal.SIGTERM))
            more = ["--epochs", "4"] if number == breaks[0] else []
            assert run_here(["resume", str(tmp_path / "broken"), *more]) == 143
    assert run_here(["resume", str(tmp_path / "broken")]) == 0
    assert end_state(tmp_path / "broken") == end_state(tmp_path / "whole")


@pytest.mark.slow
def test_a_process_that_dies_before_its_first_new_checkpoint_costs_nothing(colours, tmp_path):
    for name in ("whole", "broken"):
        assert run_here(arguments(colours, tmp_path / name)) == 0
    resume(tmp_path / "whole", epochs=3, show=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "save_inside", lambda self, epoch, step: None)
        at_step(patch, 1, lambda _: signal.raise_signal(signal.SIGTERM))
        assert run_here(["resume", str(tmp_path / "broken"), "--epochs", "3"]) == 143
    assert cd.Run(tmp_path / "broken").checkpoints.load().config["epochs"] == 2
    resume(tmp_path / "broken", show=False)
    assert end_state(tmp_path / "broken") == end_state(tmp_path / "whole")


def test_extensions_that_cannot_be(colours, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_here(arguments(colours, run, "--milestones", "1")) == 0
    before = tiny.listing(run)
    for epochs in (2, 1, 0, -1):
        assert run_here(["resume", str(run), "--epochs", str(epochs)]) == 2
        line = f"{run} has done 2 epochs: --epochs {epochs} is not more: name a larger number"
        assert line in capsys.readouterr().err
    assert run_here(["resume", str(run)]) == 2
    assert "is finished: there is nothing to resume; --epochs N extends it" in capsys.readouterr().err
    assert tiny.listing(run) == before
    metadata = json.loads((run / "config.json").read_text())
    for extended in ({}, [3], [{"epochs": 2}], [{"epochs": 2, "after_epoch": 1, "after_step": "0"}]):
        (run / "config.json").write_text(json.dumps({**metadata, "extended": extended}))
        assert run_here(["resume", str(run), "--epochs", "3"]) == 4
        assert "config.json: damaged: extended is" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_of_runs_is_extended_as_a_whole(colours, tmp_path):
    assert run_here(arguments(colours, tmp_path / "runs", "--seeds", "0", "1")) == 0
    runs = resume_together([tmp_path / "runs"], epochs=3, show=False)
    assert [run.path.name for run in runs] == ["seed0", "seed1"]
    assert [cd.Run(run.path).summary["epochs"] for run in runs] == [3, 3]


# --- the weights of another run ---


@pytest.fixture(scope="module")
def origin(colours, tmp_path_factory):
    """A run of independent students, which share no stage."""
    out = tmp_path_factory.mktemp("origin") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_report", lambda run, summary: None)
        assert run_here(arguments(colours, out, method="independent")) == 0
    return cd.Run(out)


def trained(method, data, out, **options):
    return cd.train(method, data, out=out, settings=tiny.settings(epochs=1, learning_rate=1e-12), show=False, **options)


def named(kind, students=2, classes=3):
    torch.manual_seed(5)
    return kind([cd.network("tiny", classes) for _ in range(students)], classes, image_size=(8, 8))


@pytest.mark.slow
def test_all_weights_of_the_same_method_are_taken(origin, colours, tmp_path, capsys):
    run = trained(named(cd.Independent), cd.dataset("packed", colours), tmp_path / "run", init=origin)
    for name, tensor in origin.load_method().state_dict().items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(run.load_method().state_dict()[name], tensor, rtol=0, atol=1e-6)
    assert f"weights of {origin.path}: 40 of 40 tensors" in capsys.readouterr().err
    assert run.metadata["init"] == str(origin.path) and run.metadata["initial_weights"]["from"]


def test_what_the_run_has_not_is_drawn_from_the_seed(origin, colours, tmp_path):
    classes = ("red", "green", "blue", "white")
    data = tiny.data()
    other = cd.Dataset("others", data.train, data.test, classes)
    method = named(cd.MFEF, students=3, classes=4)
    line = initial.start_from(method, initial.read_weights(str(origin.path)), other.class_names)["from"]
    words = "drawn from the seed: head of student0, head of student1, stages of student2, head of student2, "
    assert words in line and line.endswith(" (the classes are others)")
    taken = origin.load_method().cohort[0].state_dict()
    for name, tensor in method.cohort[0].state_dict().items():
        assert torch.equal(tensor, taken[name]) is ("head" not in name), name


def test_a_deeper_network_is_refused(origin):
    stages = list(cd.network("tiny", 3).stages)
    students = [cd.Network(stages[:2], PooledLinear(stages[1][0].out_channels, 3), (4, 6)) for _ in range(2)]
    method = cd.DML(students, 3, image_size=(8, 8))
    with pytest.raises(UsageError, match=r"its student0 is another network: cohort.students.0.stages.2.* is not here"):
        initial.start_from(method, initial.read_weights(str(origin.path)), ("red", "green", "blue"))


def test_another_network_is_refused(origin, colours, tmp_path, capsys):
    flags = ("--init", str(origin.path), "--networks", "tiny", "tiny:width=12")
    assert run_here(arguments(colours, tmp_path / "run", *flags, method="dml")) == 2
    words = (
        "its student1 is another network: cohort.students.1.stages.2.0.weight is [8, 6, 3, 3] there and [12, 6, 3, 3]"
    )
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()
    file = origin.export("student1", tmp_path / "student1.safetensors")
    flags = ("--init", str(origin.path), "--weights", f"student1={file}")
    assert run_here(arguments(colours, tmp_path / "run", *flags, method="dml")) == 2
    assert f"weights student1={file}: init {origin.path} has it, too: name one" in capsys.readouterr().err
    assert run_here(arguments(colours, tmp_path / "run", "--init", str(tmp_path / "none"))) == 4
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_an_interrupted_run_needs_its_origin_only_before_its_first_checkpoint(colours, tmp_path, step, origin):
    flags = ("--init", str(origin.path))
    assert run_here(arguments(colours, tmp_path / "whole", *flags, method="dml")) == 0
    broken = stopped(colours, tmp_path / "broken", step, *flags, method="dml")
    if step == 4:
        resume(broken, show=False, override={"init": str(tmp_path / "moved")})
    else:
        resume(broken, show=False)
    assert end_state(broken) == end_state(tmp_path / "whole")


# --- a function of the user ---


def test_each_epoch_is_told(tmp_path):
    seen = []

    def watch(row):
        seen.append(row.pop("epoch"))  # a copy, which is the user's
        assert row["test"]["student0"]["top1_error"] >= 0

    run = cd.train(
        tiny.method(), tiny.data(), out=tmp_path / "run", settings=tiny.settings(), on_epoch_end=watch, show=False
    )
    assert seen == [0, 1] and [row["epoch"] for row in run.metrics()] == [0, 1]


def test_a_function_that_raises_ends_a_run_that_can_be_resumed(colours, tmp_path):
    def broken(row):
        if row["epoch"] == 0:
            raise ValueError("no such\nplot")

    assert run_here(arguments(colours, tmp_path / "whole")) == 0
    config = cd.Run(tmp_path / "whole").config
    method, data = named(cd.MFEF), cd.dataset("packed", colours)
    with pytest.raises(UsageError) as caught:
        cd.train(method, data, out=tmp_path / "run", settings=config.train, on_epoch_end=broken, show=False)
    kept = f"the run is saved up to epoch 1: codistill resume {tmp_path / 'run'}"
    assert str(caught.value) == f"on_epoch_end raised ValueError: no such plot; {kept}"
    assert cd.Run(tmp_path / "run").status == "failed"
    seen = []
    resume(tmp_path / "run", show=False, on_epoch_end=lambda row: seen.append(row["epoch"]))
    assert seen == [1] and end_state(tmp_path / "run") == end_state(tmp_path / "whole")
