"""The epoch loop: what is trained on what, what is kept, and how it ends."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import codistill as cd
from codistill.cli import main
from codistill.core import device
from codistill.core.errors import CheckpointError, DivergedError, UsageError
from codistill.data.augment import Augmentation, DeviceImages, seeded_order
from codistill.data.splitting import divided
from codistill.evaluation.evaluation import Evaluation, evaluate
from codistill.sweeps.naming import digest
from codistill.training import prepare
from codistill.training import trainer as loop
from codistill.training.step import TrainStep
from codistill.training.trial import try_method

from .. import tiny


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train tiny students into folders run0, run1, .. of an empty folder, in which the process stands."""
    monkeypatch.chdir(tmp_path)
    # Drawing the page takes three times as long as all the rest.
    monkeypatch.setattr(loop, "write_report", lambda run, summary: None)
    count = iter(range(100))

    def run(method: cd.Method | None = None, data: cd.Dataset | None = None, **changes: object) -> cd.Run:
        out = f"run{next(count)}"
        settings, execution = tiny.both_settings(**changes)
        return cd.train(
            method or tiny.method(), data or tiny.data(), out=out, settings=settings, execution=execution, show=False
        )

    return run


@pytest.fixture
def steps(monkeypatch):
    """Watch the steps: for each, the positions of its images, the progress, the learning rate and what they were."""
    seen = []
    call = TrainStep.__call__

    def watched(self, batch, progress):
        rates = {float(group["lr"]) for group in self.optimizer.param_groups}
        seen.append((batch.image.tolist(), float(progress), rates, self.images))
        assert self.method.training
        call(self, batch, progress)

    monkeypatch.setattr(TrainStep, "__call__", watched)
    return seen


def state(run: cd.Run) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in run.checkpoints.load().method.items()}


@pytest.mark.parametrize("kind", [cd.MFEF, cd.FFL, cd.Independent], ids=lambda kind: kind.name)
def test_the_same_seed_gives_the_same_bytes(train, kind):
    first = train(tiny.method(kind), validation=6)
    torch.rand(3)
    np.random.rand(3)
    second = train(tiny.method(kind), validation=6)
    assert state(first) == state(second)
    assert tiny.untimed(first.metrics()) == tiny.untimed(second.metrics())
    assert tiny.untimed(first.summary) == tiny.untimed(second.summary)
    other = train(tiny.method(kind), validation=6, seed=1)
    assert tiny.untimed(other.metrics()) != tiny.untimed(first.metrics())
    assert state(other).keys() == state(first).keys() and state(other) != state(first)


def test_training_takes_nothing_from_the_programs_random_numbers(train):
    method, before = tiny.method(), torch.get_rng_state()
    train(method)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_image_is_seen_once_an_epoch(train, steps):
    run = train(data=tiny.data(train=20), epochs=3)
    assert [len(images) for images, *_ in steps] == [8, 8, 4] * 3
    epochs = [[image for images, *_ in steps[start : start + 3] for image in images] for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [progress for _, progress, *_ in steps] == pytest.approx([0] * 3 + [1 / 3] * 3 + [2 / 3] * 3)
    for row in run.metrics():
        assert row["images_per_second"] * row["seconds"] == pytest.approx(20)


def test_drop_last_leaves_out_the_partial_batch(train, steps):
    run = train(data=tiny.data(train=20), drop_last=True)
    assert [len(images) for images, *_ in steps] == [8, 8] * 2
    assert run.metrics()[0]["images_per_second"] * run.metrics()[0]["seconds"] == pytest.approx(16)


def test_the_terms_of_an_epoch_are_means_over_images(train, monkeypatch):
    seen = []
    losses = cd.MFEF.losses

    def watched(self, outputs, labels, progress):
        terms = losses(self, outputs, labels, progress)
        seen.append((len(labels), {name: term.item() for name, term in terms.items()}))
        return terms

    monkeypatch.setattr(cd.MFEF, "losses", watched)
    run = train(data=tiny.data(train=20), epochs=1)
    del seen[0]  # the step of a trial
    terms = run.metrics()[0]["train"]
    for name in seen[0][1]:
        assert terms[name] == pytest.approx(sum(count * each[name] for count, each in seen) / 20, rel=1e-5, abs=1e-7)


def test_train_limit_takes_the_first_of_the_seeded_order(train, steps):
    data = tiny.data(train=30)
    train(data=data, train_limit=11, seed=3, epochs=1)
    images = steps[0][3]
    order = seeded_order(30, 3)[:11].numpy()
    np.testing.assert_array_equal(images.positions.numpy(), order)
    assert sorted(image for step in steps for image in step[0]) == sorted(order)
    # Normalisation is that of the data set, whatever part of it is used.
    mean, std = (torch.tensor(each) for each in data.statistics)
    torch.testing.assert_close(images.affine.scale.flatten(), 1 / (255 * std))
    torch.testing.assert_close(images.affine.shift.flatten(), -mean / std)


def test_validation_images_are_held_out_of_the_training(train, steps, monkeypatch):
    held = []

    class Watched(loop.Evaluation):
        def __init__(self, method, splits, *rest, **options):
            held.extend(splits.values())
            super().__init__(method, splits, *rest, **options)

    monkeypatch.setattr(loop, "Evaluation", Watched)
    data = tiny.data(train=30)
    train(data=data, validation=10, seed=3, epochs=1)
    kept, held_out = divided(data.train.labels, 10, 3)
    validation, test = held
    assert sorted(image for step in steps for image in step[0]) == sorted(kept)
    np.testing.assert_array_equal(validation.positions.numpy(), held_out)
    np.testing.assert_array_equal(validation.images.numpy(), data.train.images)
    assert test.positions is None
    np.testing.assert_array_equal(test.images.numpy(), data.test.images)


def test_limit_and_validation_come_from_the_two_ends(train, steps):
    train(data=tiny.data(train=30), train_limit=9, validation=10, batch_size=9, epochs=1)
    assert len(steps[0][3]) == 9
    train(data=tiny.data(train=30), train_limit=20, validation=10, epochs=1)
    with pytest.raises(UsageError, match="train_limit 21 and validation 10 together exceed the 30 training images"):
        train(data=tiny.data(train=30), train_limit=21, validation=10)


def contrary(data: cd.Dataset) -> cd.Dataset:
    """Return data with wrong test labels: the more is learned, the larger the test error."""
    return dataclasses.replace(data, test=cd.Split(data.test.images, (data.test.labels + 1) % 3))


def student_error(scores: dict[str, dict[str, float]]) -> float:
    return min(scores[name]["top1_error"] for name in ("student0", "student1"))


@pytest.mark.parametrize("validation", [0, 12])
def test_the_best_epoch_is_chosen_by_validation_where_there_is_one(train, validation):
    data = tiny.data(train=96, test=30)
    changes = {"epochs": 4, "milestones": (), "learning_rate": 0.02}
    run = train(data=contrary(data) if validation else data, validation=validation, **changes)
    rows, summary = run.metrics(), run.summary
    chosen_on = "validation" if validation else "test"
    assert all(("validation" in row) is bool(validation) for row in rows)
    errors = [student_error(row[chosen_on]) for row in rows]
    best = errors.index(min(errors))
    assert summary["best_epoch"] == best + 1 and summary["best_epoch_chosen_on"] == chosen_on
    assert summary["best_epoch_top1_error"] == {name: each["top1_error"] for name, each in rows[best]["test"].items()}
    assert summary["top1_error"] == {name: each["top1_error"] for name, each in rows[-1]["test"].items()}
    assert [entry["epoch"] for entry in run.checkpoints.entries() if entry["best"]] == [best + 1]
    # The first and the last epoch, or the test set instead of the validation set, would not do.
    assert 0 < best < 3
    on_test = [student_error(row["test"]) for row in rows]
    assert (on_test.index(min(on_test)) == best) is not bool(validation)


def test_the_best_and_the_last_two_checkpoints_are_kept(train):
    data = contrary(tiny.data(train=96, test=30))
    run = train(data=data, epochs=5, milestones=(), learning_rate=0.02)
    assert run.summary["best_epoch"] < 3
    assert [entry["epoch"] for entry in run.checkpoints.entries()] == [run.summary["best_epoch"], 4, 5]
    last = run.checkpoints.load()
    assert last.epoch == 5 and len(last.momentum) == len(list(tiny.method().parameters()))


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"epochs": 4}, [0.2, 0.2, 0.02, 0.002]),
        ({"epochs": 3}, [0.2, 0.2, 0.02]),
        ({"epochs": 1}, [0.2]),
        ({"epochs": 4, "milestones": (1,), "learning_rate_decay": 0.5}, [0.2, 0.1, 0.1, 0.1]),
        ({"epochs": 3, "milestones": ()}, [0.2] * 3),
    ],
)
def test_the_learning_rate_of_each_epoch_is_used_and_recorded(train, steps, changes, rates):
    run = train(learning_rate=0.2, **changes)
    assert [row["learning_rate"] for row in run.metrics()] == pytest.approx(rates)
    assert [rate for *_, found, _ in steps for rate in found] == pytest.approx(
        [rate for rate in rates for _ in range(3)]
    )


def test_it_learns(train):
    run = train(data=tiny.data(train=96, test=48), epochs=6, learning_rate=0.1)
    rows = run.metrics()
    assert rows[-1]["train"]["loss"] < 0.5 * rows[0]["train"]["loss"]
    assert all(error < 25 for error in run.summary["top1_error"].values())


def test_the_method_is_trained_in_place(train):
    method = tiny.method()
    run = train(method)
    trained = method.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in run.checkpoints.load().method.items())


def test_bf16_trains(train):
    run = train(precision="bf16", epochs=1)
    assert run.summary["status"] == "finished" and run.config.execution.precision == "bf16"
    wide = train(epochs=1)
    assert run.metrics()[0]["train"]["loss"] == pytest.approx(wide.metrics()[0]["train"]["loss"], rel=0.1)
    assert state(run) != state(wide)


def test_epochs_and_place_have_short_ways(train):
    data, settings = tiny.data(name="own data"), tiny.settings(epochs=9)
    first = cd.train(tiny.method(), data, epochs=1, settings=settings, show=False)
    assert first.config.train == dataclasses.replace(settings, epochs=1)
    second = cd.train(tiny.method(), data, epochs=1, settings=settings, show=False)
    assert [run.path.parent.name for run in (first, second)] == ["runs", "runs"]
    assert second.path.name == f"{first.path.name}-2"


def test_threads_are_set_where_a_number_is_given(train, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    train(epochs=1, threads=None)
    train(epochs=1, threads=2)
    assert given == [2]


@pytest.mark.fault(86)
@pytest.mark.parametrize("changes", [{}, {"drop_last": True}, {"train_limit": 7}, {"validation": 22}, {"data": (2,)}])
def test_fewer_images_than_a_batch_train_together(train, steps, capsys, changes):
    whole = tiny.data(*changes.pop("data", (24,)))
    run = train(data=whole, epochs=2, batch_size=128, **changes)
    count = changes.get("train_limit", len(whole.train) - changes.get("validation", 0))
    assert [len(images) for images, *_ in steps] == [count] * 2
    assert run.summary["status"] == "finished" and run.config.train.batch_size == 128
    assert capsys.readouterr().err.count(f"there are {count} training images, less than a batch of 128") == 1


@pytest.mark.fault(85)
def test_a_white_channel_is_said_and_recorded_as_trained(train, capsys):
    whole = tiny.data()
    for split in (whole.train, whole.test):
        split.images[..., 2] = 255
    run = train(data=whole, epochs=1)
    assert capsys.readouterr().err.count("hardly any spread in blue (mean 255") == 1
    assert run.metadata["dataset"]["std"] == list(whole.statistics[1]) and run.metadata["dataset"]["std"][2] >= 0.01
    scores = run.metrics()[-1]["test"]["student0"]
    assert dataclasses.asdict(run.evaluate()["student0"]) == pytest.approx(scores)
    for wrong in (0.0, -1.0, math.nan):
        facts = {**run.metadata, "dataset": {**run.metadata["dataset"], "std": [0.2, 0.2, wrong]}}
        (run.path / "config.json").write_text(json.dumps(facts))
        with pytest.raises(CheckpointError, match="damaged: std of the dataset is"):
            cd.Run(run.path)


@pytest.mark.fault(87)
@pytest.mark.parametrize(("share", "count"), [("25%", 6), ("12.5%", 3), ("0.01%", 1)])
def test_validation_may_be_a_percentage(train, share, count):
    run = train(epochs=1, validation=share, drop_last=True)
    assert run.config.train.validation == run.metadata["validation"] == share
    assert run.summary["best_epoch_chosen_on"] == "validation"
    assert state(run) == state(train(epochs=1, validation=count, drop_last=True))


REFUSED = {
    "a batch of one": ({"data": (25,)}, {}, "the last batch of 25 images would be a single image.*drop_last"),
    "a limit beyond the data": ({}, {"train_limit": 25}, "train_limit 25 and validation 0 together exceed the 24"),
    "all for validation": ({}, {"validation": 24}, "validation is 24, but data set colours has 24 training images"),
    "too much reflection": ({}, {"padding": 8, "padding_mode": "reflect"}, "padding is 8, but reflection needs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(train, monkeypatch, tmp_path, case):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made, changes, message = REFUSED[case]
    with pytest.raises(UsageError, match=message) as error:
        train(data=tiny.data(*made.get("data", ())), **changes)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((4, 4, 4), "network Network has 4 classes, but data set colours 3"),
        ((3, 4, 3), "network Network has 4 classes, but data set colours 3"),
        ((3, 3, 4), "mfef was made for 4 classes, but data set colours has 3"),
    ],
)
def test_unlike_numbers_of_classes_are_refused(train, tmp_path, classes, message):
    students = [*tiny.own_students(1, classes[0]), *tiny.own_students(1, classes[1])]
    method = cd.MFEF(students, classes[2], cd.MFEF.Settings(shared_stages=0), (8, 8))
    with pytest.raises(UsageError, match=message):
        train(method)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [cd.MFEF, cd.METHODS["kdgan"], cd.METHODS["pcl"], cd.METHODS["okdph"]])
def test_trying_a_method_changes_nothing(train, kind):
    # A copy trains for a step: neither statistics nor mode nor random numbers may notice.
    method = tiny.method(kind)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    drawn = torch.get_rng_state()
    try_method(method, tiny.data(), tiny.settings(), "float32", torch.device("cpu"), Augmentation())
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    assert method.training and torch.equal(torch.get_rng_state(), drawn)


class Poisoned(cd.Independent):
    """Whose second student's loss, or only its gradient, is no number from a step on."""

    step = 0
    poisoned_step = 4
    way = "loss"

    def losses(self, outputs, labels, progress):
        self.step += 1
        terms = super().losses(outputs, labels, progress)
        if self.step >= self.poisoned_step:
            if self.way == "loss":
                terms["ce/student1"] = terms["ce/student1"] * math.nan
            elif self.way == "inf":
                terms["ce/student1"] = terms["ce/student1"] + math.inf
            else:
                # sqrt(0) has an infinite slope: 0 in the loss, 0 * inf = NaN in the gradient.
                terms["ce/student1"] = terms["ce/student1"] + (outputs.logits[1] * 0).sum().square().sqrt()
        return terms


def poisoned(step: int, way: str) -> Poisoned:
    method = Poisoned(tiny.own_students(), 3, image_size=(8, 8))
    method.poisoned_step, method.way = step, way
    return method


@pytest.mark.parametrize("way", ["loss", "inf"])
def test_a_loss_that_is_no_number_ends_the_run(train, tmp_path, way):
    # Three steps an epoch: the fourth is in the second epoch.
    with pytest.raises(
        DivergedError,
        match=r"^student1 \(loss ce/student1\) became NaN or infinite at step 1 of epoch 2 at learning rate 0\.05: ",
    ):
        train(poisoned(4, way), epochs=4, milestones=())
    run = cd.Run(tmp_path / "run0")
    summary = run.summary
    assert summary["status"] == "diverged" and "ce/student1" in summary["error"]
    assert (summary["method"], summary["epochs"], summary["seed"]) == ("independent", 4, 0)
    assert [entry["epoch"] for entry in run.checkpoints.entries()] == [1]
    assert all(tensor.isfinite().all() for tensor in run.checkpoints.load().method.values())
    assert len(run.metrics()) == 1


@pytest.mark.parametrize("step", [4, 6], ids=["first step", "last step"])
def test_a_gradient_that_is_no_number_ends_the_run(train, tmp_path, step):
    # No loss of the step shows it, and after the last step of the epoch none at all.
    words = rf"^student1 \(gradient of cohort\.students\.1\..* became NaN or infinite at step {step - 3} of epoch 2"
    with pytest.raises(DivergedError, match=words):
        train(poisoned(step, "gradient"), epochs=4)
    run = cd.Run(tmp_path / "run0")
    assert run.summary["status"] == "diverged"
    assert [(entry["epoch"], entry["best"]) for entry in run.checkpoints.entries()] == [(1, True)]
    assert all(tensor.isfinite().all() for tensor in run.checkpoints.load().method.values())
    assert all(math.isfinite(row["test"]["student1"]["nll"]) for row in run.metrics())


@pytest.mark.parametrize("batch_size", [4, 24], ids=["within the epoch", "by the last step"])
def test_too_large_a_learning_rate_diverges(train, tmp_path, batch_size):
    with pytest.raises(DivergedError, match=r"epoch 1 at learning rate 1e\+09: lower --learning-rate"):
        train(learning_rate=1e9, batch_size=batch_size)
    run = cd.Run(tmp_path / "run0")
    assert run.summary["status"] == "diverged" and run.checkpoints.entries() == []


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "interrupted"), (RuntimeError("broken"), "failed")],
)
def test_a_run_that_is_broken_off_says_so(train, tmp_path, monkeypatch, error, status):
    call, count = TrainStep.__call__, iter(range(100))

    def breaking(self, batch, progress):
        if next(count) == 4:
            raise error
        call(self, batch, progress)

    monkeypatch.setattr(TrainStep, "__call__", breaking)
    with pytest.raises(type(error)):
        train(epochs=4)
    run = cd.Run(tmp_path / "run0")
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["status"] == status and summary["error"] == str(error)
    assert [entry["epoch"] for entry in run.checkpoints.entries()] == [1] and len(run.metrics()) == 1
    with pytest.raises(UsageError, match="is not empty"):
        cd.train(tiny.method(), tiny.data(), out=run.path, settings=tiny.settings(), show=False)


def test_some_epochs_are_not_evaluated(train, monkeypatch, capsys):
    settings = {"data": tiny.data(train=96, test=30), "epochs": 5, "learning_rate": 0.02, "validation": 12}
    each, passes = train(**settings), []
    run_pass = Evaluation.run
    monkeypatch.setattr(Evaluation, "run", lambda self, between: passes.append(run_pass(self, between)))
    some = train(evaluate_every=2, **settings)
    assert len(passes) == 3 and state(some) == state(each)
    rows, all_rows = some.metrics(), each.metrics()
    for epoch, (row, other) in enumerate(zip(rows, all_rows, strict=True)):
        assert row["train"] == other["train"]
        if epoch in (1, 3, 4):
            assert tiny.untimed(row) | {"warnings": []} == tiny.untimed(other) | {"warnings": []}
        else:
            assert not {"test", "validation", "diversity"} & row.keys() and row["warnings"] == []
    scored = [row for row in all_rows if row["epoch"] in (1, 3, 4)]
    best = min(scored, key=lambda row: student_error(row["validation"]))
    assert some.summary["best_epoch"] == best["epoch"] + 1
    assert some.summary["top1_error"] == each.summary["top1_error"]
    assert [entry["epoch"] for entry in some.checkpoints.entries() if entry["best"]] == [best["epoch"] + 1]
    assert capsys.readouterr().err == ""  # the events were written, too


@pytest.mark.parametrize("fast", ["avx512_bf16", ""])
def test_auto_is_bf16_where_the_cpu_is_fast_in_it_and_config_json_says_both(train, monkeypatch, fast):
    monkeypatch.setattr(device, "fast_bf16", lambda device: fast)
    run = train(precision="auto", epochs=1)
    wanted = "bf16" if fast else "float32"
    assert (run.config.execution.precision, run.asked.execution.precision) == (wanted, "auto")
    assert run.metadata["precision"] == wanted and run.metadata["asked"] == {"precision": "auto"}
    same = train(precision=wanted, epochs=1)
    assert state(run) == state(same) and "asked" not in same.metadata
    # A sweep knows its run again.
    config = dataclasses.replace(run.config, execution=cd.ExecutionSettings(precision="auto", threads=1))
    assert digest(run.asked) == digest(config) != digest(run.config)


@pytest.mark.usefixtures("train")
def test_what_bf16_would_gain_is_said_once_of_a_long_run(tmp_path, monkeypatch, capsys, tiny_registered):
    for module in (loop, prepare):
        monkeypatch.setattr(module, "fast_bf16", lambda device: "AMX")
    monkeypatch.setattr(loop, "LONG_RUN", 0)
    path = str(tiny.write_npz(tmp_path / "colours.npz", tiny.data()))

    def said(*flags: str) -> int:
        flags = ("--data", "packed", "--data-dir", path, "--epochs", "2", "-b", "8", "--threads", "1", *flags)
        assert main(["train", "independent", "--networks", "tiny", *flags]) == 0
        out, error = capsys.readouterr()
        assert error == ""
        return out.count("this CPU has AMX: with --precision bf16 a step is about 1.5 times as fast as in float32\n")

    assert [said(), said("--seeds", "0", "1"), said("--precision", "bf16")] == [1, 1, 0]
    monkeypatch.setattr(loop, "LONG_RUN", 600)
    assert said() == 0


def test_bf16_on_a_cpu_that_is_slow_in_it_is_said(train, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "fast_bf16", lambda device: "")
    run = train(epochs=1, precision="bf16")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("codistill: warning: precision bf16: this CPU has no AMX or avx512_bf16, so a step may take")
    assert run.finished


def test_a_run_in_bf16_can_be_evaluated_in_float32(train):
    usual, wide = (train(precision="bf16", evaluation_precision=each) for each in ("same", "float32"))
    assert state(usual) == state(wide)
    images = DeviceImages(tiny.data().test, tiny.data().statistics, torch.device("cpu"))
    for run, precision in ((usual, "bf16"), (wide, "float32")):
        scores = {
            name: dataclasses.asdict(each) for name, each in evaluate(run.load_method(), images, precision).items()
        }
        found = {name: dataclasses.asdict(each) for name, each in run.evaluate(device="cpu").items()}
        for name, row in run.metrics()[-1]["test"].items():
            assert row == pytest.approx(scores[name], rel=1e-4) and found[name] == pytest.approx(row, rel=1e-4)
    assert usual.metrics()[-1]["test"] != wide.metrics()[-1]["test"]


def test_a_training_that_ends_before_its_first_file_leaves_no_folder(tmp_path, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("codistill.training.train.choose_threads", stopped)
    with pytest.raises(KeyboardInterrupt):
        cd.train(tiny.method(), tiny.data(), settings=tiny.settings(), show=False)
    assert not list(tmp_path.iterdir())
