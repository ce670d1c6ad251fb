"""Runs side by side: each ends bit for bit as it would have ended alone."""

import contextlib
import dataclasses
import gc
import itertools
import json
import math
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import codistill as cd
from codistill.cli import main
from codistill.core.device import set_up_gpu
from codistill.core.errors import CheckpointError, UsageError
from codistill.core.randomness import seed_draws
from codistill.data.augment import Augmentation, DeviceImages, epoch_indices
from codistill.methods import METHODS
from codistill.methods.kd import WithTeacher
from codistill.methods.kdcl import KDCLSettings
from codistill.settings.config import RunConfig, TeacherSettings, default_config
from codistill.training import fleet, resume
from codistill.training import trainer as loop
from codistill.training.capture import GraphedSteps, make_fleet
from codistill.training.compiling import Execution
from codistill.training.fleet import train_fleet, train_seeds
from codistill.training.prepare import DeviceSplits, build_taught, check, set_up
from codistill.training.resume import resume_together
from codistill.training.step import TrainStep, make_step
from codistill.training.train import train_from_config
from codistill.training.trial import IMAGES

from .. import tiny
from ..faults.asserting import refused

CPU = torch.device("cpu")
TINY = ["--networks", "tiny", "tiny", "--data", "packed", "--batch-size", "8", "--lr", "0.05", "--threads", "1"]
# Fusion, views, means of weights, alternating updates, a teacher, two stages, draws, a hub and pauses.
CAPTURED_FIRST = ("mfef", "kdcl", "pcl", "dml", "kd", "fsp", "kdgan", "okdph", "switokd")
STUDENTS = {"okddip": 3, "ffsd": 3, "byot": 1}
on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
on_every_device_slowly = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.slow])]
)
pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(scope="module")
def colours(tiny_registered, tmp_path_factory) -> str:
    # Seven test images to a class and 20 to train on: the last batch of an epoch is smaller.
    return str(tiny.write_npz(tmp_path_factory.mktemp("fleet") / "colours.npz", tiny.data(train=20, test=21)))


@pytest.fixture
def config(colours):
    """Describe a run of tiny students; `method` holds settings of the method."""

    def describe(name: str = "mfef", method: Any = None, **changes: Any) -> RunConfig:
        students = ("tiny",) * STUDENTS.get(name, 2)
        base = dataclasses.replace(default_config(name), networks=students, data="packed", data_dir=colours)
        train, execution = tiny.both_settings(**changes)
        return dataclasses.replace(base, train=train, execution=execution, method=method or base.method)

    return describe


def repeatable_on(device: str, config: RunConfig) -> RunConfig:
    """Make a run compute on a device, bit for bit as any other there."""
    execution = dataclasses.replace(config.execution, device=device, deterministic=True)
    return dataclasses.replace(config, execution=execution)


def bits(value: Any) -> Any:
    """Turn every tensor of a checkpoint into its bytes."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes())
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    return [bits(each) for each in value] if isinstance(value, (list, tuple)) else value


def assert_equal(run: cd.Run, alone: cd.Run) -> None:
    assert tiny.untimed(run.metrics()) == tiny.untimed(alone.metrics())
    assert tiny.untimed(run.summary) == tiny.untimed(alone.summary)
    assert run.metadata == alone.metadata
    assert [entry["epoch"] for entry in run.checkpoints.entries()] == [
        entry["epoch"] for entry in alone.checkpoints.entries()
    ]
    for which in ("last", "best"):
        first, second = (bits(each.checkpoints.load(which).as_mapping()) for each in (run, alone))
        assert first.keys() == second.keys() and first["method"].keys() == second["method"].keys()
        rows = [[tiny.untimed(json.loads(line)) for line in each.pop("rows")] for each in (first, second)]
        assert first == second and rows[0] == rows[1]


def folders(count: int) -> list[Path]:
    return [Path("fleet") / f"member{index}" for index in range(count)]


@on_every_device
def test_members_equal_their_lone_runs(config, device):
    configs = [repeatable_on(device, config(seed=seed, validation=4)) for seed in (0, 1, 2)]
    runs = train_fleet(configs, folders(3), show=False)
    assert [run.path for run in runs] == folders(3)
    for index, each in enumerate(configs):
        assert_equal(runs[index], train_from_config(each, Path(f"alone{index}"), show=False))
    weights = [bits(run.checkpoints.load().method) for run in runs]
    assert all(first != second for first, second in itertools.combinations(weights, 2))


@on_every_device_slowly
def test_a_fleet_may_mix_methods_and_settings(config, device):
    configs = [
        config("kdcl", seed=3),  # two views
        config("mfef", learning_rate=0.02, weight_decay=0.01),
        config("dml", method=METHODS["dml"].Settings(update="alternating"), nesterov=False, milestones=(1,)),
        dataclasses.replace(config("independent", padding=2), networks=("tiny",)),
        config("pcl"),
        config("okddip", flip=True),
        config("byot", momentum=0.5),
        config("kdcl", method=KDCLSettings(views_per_student=False)),
    ]
    configs = [repeatable_on(device, each) for each in configs]
    runs = train_fleet(configs, folders(8), show=False)
    for index, each in enumerate(configs):
        assert_equal(runs[index], train_from_config(each, Path(f"alone{index}"), show=False))


@on_every_device_slowly
def test_a_fleet_may_have_teachers(config, device):
    train_from_config(config("independent"), Path("teacher"), show=False)
    teaching = TeacherSettings(teacher="teacher", teacher_weight=0.5)
    configs = [dataclasses.replace(config(name), teaching=teaching) for name in ("kd", "kdcl")] + [config()]
    configs = [repeatable_on(device, each) for each in configs]
    runs = train_fleet(configs, folders(3), show=False)
    for index, each in enumerate(configs):
        assert_equal(runs[index], train_from_config(each, Path(f"alone{index}"), show=False))


def test_a_fleet_of_one(config):
    (run,) = train_fleet([config()], folders(1), show=False)
    assert_equal(run, train_from_config(config(), Path("alone"), show=False))


def test_seeds_on_the_command_line(colours, capsys):
    flags = ["train", "ffl", *TINY, "--data-dir", colours, "--epochs", "2"]
    assert main([*flags, "--seeds", "0", "1", "2", "--out", "several"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert sorted(each.name for each in Path("several").iterdir()) == ["seed0", "seed1", "seed2"]
    for seed in (0, 1, 2):
        assert f"seed{seed}: epoch 2/2" in out and f"run folder: several/seed{seed}" in out
        assert main([*flags, "--seed", str(seed), "--out", f"alone{seed}"]) == 0
        assert_equal(cd.Run(f"several/seed{seed}"), cd.Run(f"alone{seed}"))
        assert cd.Run(f"several/seed{seed}").config.train.seed == seed


def test_seeds_without_a_folder_have_one_below_runs(config):
    runs = train_seeds(config(epochs=1), [4, 2], show=False)
    assert [str(run.path) for run in runs] == [f"runs/packed-mfef-tinyx2-seeds/seed{seed}" for seed in (4, 2)]
    again = train_seeds(config(epochs=1), [4], show=False)
    assert str(again[0].path) == "runs/packed-mfef-tinyx2-seeds-2/seed4"


FLAGS = ["--networks", "tiny", "tiny", "--data", "packed", "--batch-size", "8", "--threads", "1", "--epochs", "2"]


def recipes(**settings: dict[str, Any]) -> list[str]:
    """Write recipes; give their names."""
    for name, each in settings.items():
        Path(f"{name}.json").write_text(json.dumps(each))
    return [f"{name}.json" for name in settings]


def test_recipes_on_the_command_line(colours):
    files = recipes(
        a={"method": "ffl", "seed": 3},
        b={"method": {"name": "dml", "temperature": 2}, "learning_rate": 0.05},
        c={"learning_rate": 0.02},
    )
    flags = [*FLAGS, "--data-dir", colours, "--weight-decay", "0.01"]
    assert main(["train", "--recipes", *files, *flags, "--out", "several"]) == 0
    for file in files:
        alone = Path("alone") / Path(file).stem
        assert main(["train", "--recipe", file, *flags, "--out", str(alone)]) == 0
        assert_equal(cd.Run(Path("several") / alone.name), cd.Run(alone))
    assert cd.Run("several/b").config.method.temperature == 2
    assert main(["train", "ffl", "--recipes", "c.json", *flags]) == 0
    assert cd.Run("runs/packed-ffl-tinyx2-recipes/c").finished


@on_every_device_slowly
def test_of_recipes_one_may_diverge(colours, capsys, device):
    files = recipes(a={}, b={"learning_rate": 1e30})
    flags = [*FLAGS, "--data-dir", colours, "--device", device]
    assert main(["train", "--recipes", *files, *flags, "--out", "several"]) == 5
    line = "codistill: error: 1 of 2 runs diverged: several/b; the others are finished"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert [cd.Run(f"several/{name}").status for name in "ab"] == ["finished", "diverged"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recipes", "a.json", "--recipe", "b.json"], "--recipes and --recipe: give one of them only"),
        (["--recipes", "a.json", "--seeds", "0", "1"], "--recipes and --seeds: give one of them only"),
        (["--recipes=b.json", "--preset=mfef"], "--recipes and --preset: give one of them only"),
        (["--recipes"], "--recipes: name at least one"),
        (["--seeds"], "--seeds: name at least one"),
        (["--recipes", "a.json", "more/a.json"], "--recipes a.json: two runs would be in a: rename one of the files"),
        (["--recipes", "b.json", "none.json"], "recipe none.json: "),
        (["--recipes", "b.json", "bad.json"], "bad.json:1: unknown key 'sed': did you mean seed"),
        (["mfef", "--recipes", "b.json", "a.json"], "the recipe is for dml, not for mfef"),
        (["--recipes", "b.json", "long.json"], "runs side by side must have one epochs: 300 and another"),
        (["--recipes", "b.json", "--epoch", "3"], "unknown option --epoch: did you mean --epochs"),
    ],
)
def test_recipes_that_cannot_be_are_status_2(colours, capsys, tmp_path, words, said):
    recipes(a={"method": "dml"}, b={}, bad={"sed": 1}, long={"epochs": 3})
    flags = FLAGS[: FLAGS.index("--epochs")]
    refused(capsys, ["train", *words, *flags, "--data-dir", colours, "--out", "out"], 2, said, unchanged=tmp_path)


# What diverges is dropped.


def poison(monkeypatch, seed: int, step: int = 4, kind: type[cd.Method] = cd.MFEF) -> None:
    """Make the loss of the run with this seed no number from a step on."""
    counts = weakref.WeakKeyDictionary[cd.Method, int]()  # a later method may have the id of one that is gone
    losses = kind.losses

    def poisoned(self, outputs, labels, progress):
        terms = losses(self, outputs, labels, progress)
        counts[self] = counts.get(self, 0) + 1
        if getattr(self, "poisoned", False) and counts[self] >= step:
            terms["ce/student0"] = terms["ce/student0"] * math.nan
        return terms

    build = fleet.build_taught

    def built(config, data):
        method = build(config, data)
        method.poisoned = config.train.seed == seed
        return method

    monkeypatch.setattr(kind, "losses", poisoned)
    monkeypatch.setattr(fleet, "build_taught", built)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), 2], ids=["first", "middle", "last"])
def test_one_that_diverges_is_dropped_and_the_others_go_on(config, monkeypatch, capsys, seed):
    configs = [config(seed=each, epochs=3) for each in (0, 1, 2)]
    with monkeypatch.context() as patch:
        poison(patch, seed)  # three steps an epoch: in the second one
        runs = train_fleet(configs, folders(3))
        out, error = capsys.readouterr()
    words = "became NaN or infinite at step 1 of epoch 2 at learning rate 0.05: lower --learning-rate"
    assert error.startswith(f"codistill: warning: member{seed} is dropped: student0 (loss ce/student0) ")
    assert error.count("\n") == 1
    assert words in error and "epoch 3/3" in out
    dropped = runs[seed]
    assert dropped.summary["status"] == "diverged" and words in dropped.summary["error"]
    assert str(dropped.path) in dropped.summary["error"]
    assert [entry["epoch"] for entry in dropped.checkpoints.entries()] == [1] and len(dropped.metrics()) == 1
    for index in {0, 1, 2} - {seed}:
        assert_equal(runs[index], train_from_config(configs[index], Path(f"alone{index}"), show=False))


def test_all_may_diverge(config, monkeypatch, capsys):
    configs = [config(seed=0), config(seed=0, weight_decay=0.01)]
    poison(monkeypatch, 0, step=1)
    runs = train_fleet(configs, folders(2), show=False)
    assert [run.summary["status"] for run in runs] == ["diverged", "diverged"]
    assert [run.checkpoints.entries() for run in runs] == [[], []]
    assert capsys.readouterr().err.count("is dropped") == 2


@pytest.mark.parametrize(
    ("count", "free", "sizes"),
    [(6, 99, [6]), (6, 5.5, [3, 3]), (7, 3.5, [3, 2, 2]), (5, 2.5, [2, 2, 1]), (3, 0.1, [1, 1, 1]), (1, 0.1, [1])],
)
def test_as_many_runs_at_a_time_as_memory_holds(config, monkeypatch, capsys, count, free, sizes):
    monkeypatch.setattr(fleet, "memory_of_a_run", lambda *_: 2**30)
    free_bytes = free * 2**30 * fleet.ALLOWANCE / fleet.USED_SHARE
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free_bytes, 2**40))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    plan = check(tiny.method(), tiny.data(), config(), CPU)
    plans = [dataclasses.replace(plan, device=torch.device("cuda")) for _ in range(count)]
    assert fleet.side_by_side(plans, DeviceSplits(tiny.data(), CPU)) == sizes
    error = capsys.readouterr().err
    assert error.count("\n") == (len(sizes) > 1)
    if len(sizes) > 1:
        assert f"{count} runs, but a GPU has" in error and f"in {len(sizes)} groups of at most {sizes[0]}" in error


def test_a_group_has_gone_when_the_next_one_begins(config, monkeypatch):
    def drawing(run, summary):
        try:
            raise ValueError
        except ValueError as error:
            kept = error  # a cycle that holds the frames of all callers, as libraries leave them
            assert kept

    @contextlib.contextmanager
    def watched(*arguments, **named):
        there.append([each() is not None for each in gone])
        with set_up(*arguments, **named) as loop:
            gone.append(weakref.ref(loop.step))
            yield loop
        del loop

    there: list[list[bool]] = []
    gone: list[weakref.ref[TrainStep]] = []
    monkeypatch.setattr(fleet, "side_by_side", lambda *_: [1, 1])
    monkeypatch.setattr(fleet, "set_up", watched)
    monkeypatch.setattr(loop, "write_report", drawing)
    gc.disable()
    try:
        train_fleet([config(seed=seed) for seed in range(2)], folders(2), show=False)
    finally:
        gc.enable()
    assert there == [[], [False]]


def test_groups_that_wait_are_resumed_too(config, monkeypatch):
    configs = [config(seed=seed) for seed in (0, 1, 2)]
    sizes = {3: [2, 1], 2: [1, 1], 1: [1]}
    for module in (fleet, resume):
        monkeypatch.setattr(module, "side_by_side", lambda plans, _: sizes[len(plans)])
    call, count = TrainStep.__call__, iter(range(100))

    def stopping(self, *arguments):
        if next(count) == 5:
            signal.raise_signal(signal.SIGTERM)
        call(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", stopping)
        with pytest.raises(SystemExit):
            train_fleet(configs, folders(3), show=False)
    resume_together([Path("fleet")], show=False)
    for index, each in enumerate(configs):
        assert_equal(cd.Run(folders(3)[index]), train_from_config(each, Path(f"alone{index}"), show=False))


def test_runs_are_of_one_kind_where_their_steps_take_as_long(colours, config):
    data = cd.dataset("packed", colours)

    def kind(*given, **changes):
        each = config(*given, **changes)
        return check(build_taught(each, data), data, each, CPU).kind

    first = kind()
    assert first == kind(seed=1) == kind(weight_decay=0.01)
    others = [kind(optimizer="adamw", learning_rate=0.001), kind(ema_decay=0.9), kind("dml"), kind("ffl")]
    others.append(kind(method=METHODS["mfef"].Settings(attention="none")))
    assert len({first, *others}) == 6


@pytest.mark.parametrize("changes", [{}, {"validation": 4}, {"train_limit": 16}], ids=["all", "validation", "limit"])
def test_runs_side_by_side_have_one_copy_of_their_images(config, monkeypatch, changes):
    made = []
    build = DeviceImages.__init__
    monkeypatch.setattr(DeviceImages, "__init__", lambda self, *rest: made.append((rest[0], build(self, *rest))))
    train_fleet([config(seed=seed, **changes) for seed in (0, 1, 2)], folders(3), show=False)
    assert len([split for split, _ in made if len(split) > IMAGES]) == 2  # training and test; the others are of trials


# What does not go together.


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"epochs": 3}, "epochs: 2"),
        ({"batch_size": 4}, "batch_size: 8"),
        ({"drop_last": True}, "drop_last: False"),
        ({"train_limit": 16}, "train_limit: None"),
        ({"validation": 4}, "validation: 0"),
        ({"precision": "bf16"}, "precision: 'float32'"),
        ({"device": "cpu"}, "device: 'auto'"),
        ({"threads": 2}, "threads: 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unlike_runs_are_refused(config, tmp_path, changes, key):
    with pytest.raises(UsageError, match=f"^runs side by side must have one {key} and another$"):
        train_fleet([config(), config(seed=1), config(**changes)], folders(3), show=False)
    assert list(tmp_path.iterdir()) == []


def test_a_seed_twice_is_refused(config, colours, capsys, tmp_path):
    with pytest.raises(UsageError, match=r"seeds are \[0, 1, 0\]: name each once"):
        train_seeds(config(), [0, 1, 0], Path("out"), show=False)
    assert main(["train", *TINY, "--data-dir", colours, "--seeds", "1", "1", "--out", "out"]) == 2
    assert "seeds are [1, 1]: name each once" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_folder_that_is_not_empty_is_refused_before_anything_is_written(config, tmp_path, taken):
    other = Path("out") / f"seed{taken}"
    other.mkdir(parents=True)
    (other / "notes.txt").write_text("mine")
    before = tiny.listing(tmp_path)
    with pytest.raises(UsageError, match=rf"run folder out/seed{taken} is not empty: choose another --out"):
        train_seeds(config(), [0, 1, 2], Path("out"), show=False)
    assert tiny.listing(tmp_path) == before


def test_a_folder_twice_is_refused(config, tmp_path):
    with pytest.raises(UsageError, match="need a run folder each, but one is named twice"):
        train_fleet([config(), config(seed=1)], [Path("same"), Path("same")], show=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"padding": 8, "padding_mode": "reflect"}, "padding is 8, but reflection needs"),
        ({"networks": ("tiny",)}, "mfef needs at least 2 students"),
        ({"networks": ("tiny", "none")}, "unknown network 'none'"),
        ({"teaching": TeacherSettings(teacher="none")}, "teacher none: no such run folder or file"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_one_that_cannot_work_is_found_before_anything_is_written(config, tmp_path, changes, message):
    bad = config(**changes) if "padding" in changes else dataclasses.replace(config(), **changes)
    with pytest.raises(CheckpointError if "teaching" in changes else UsageError, match=message):
        train_fleet([config(), bad], folders(2), show=False)
    assert list(tmp_path.iterdir()) == []


# The steps.


def method_of(name: str, seed: int = 0, image_size: tuple[int, int] = (8, 8)) -> cd.Method:
    torch.manual_seed(seed)
    method = METHODS[name](tiny.own_students(STUDENTS.get(name, 2)), 3, image_size=image_size)
    return WithTeacher(method, tiny.own_students(1)[0]) if METHODS[name].teacher == "required" else method


def member_of(name: str, seed: int, device: torch.device = CPU, precision: str = "float32") -> TrainStep:
    images = DeviceImages(tiny.data().train, tiny.data().statistics, device)
    return make_step(method_of(name, seed), images, Augmentation(), tiny.settings(), precision)


@pytest.fixture
def repeatable(monkeypatch):
    """Allow only algorithms of CUDA that repeat bit for bit."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    set_up_gpu(torch.device("cuda"), deterministic=True)
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "precision", "members", "overlap"),
    [
        pytest.param(name, "float32", 1, True, marks=() if name in CAPTURED_FIRST else pytest.mark.slow)
        for name in METHODS
    ]
    + [
        pytest.param(name, *rest, marks=() if name == "kdcl" else pytest.mark.slow)
        for name in ("mfef", "kdcl", "pcl", "dml")
        for rest in (("float32", 2, True), ("bf16", 1, False), ("bf16", 2, False))
    ],
)
def test_a_captured_fleet_equals_plain_steps(repeatable, name, precision, members, overlap):
    device = torch.device("cuda")
    plain = [member_of(name, seed, device, precision) for seed in range(members)]
    fast = [member_of(name, seed, device, precision) for seed in range(members)]
    with contextlib.ExitStack() as running:
        for member in fast:
            running.enter_context(Execution(overlap=overlap).on(member.method, device))
        compare_steps(plain, fast, 12 if precision == "float32" else 10)
    assert not any(member.method.cohort.streams for member in fast)


@pytest.mark.fault(96)
@pytest.mark.gpu
@pytest.mark.parametrize(("members", "host"), [(1, False), (2, False), (2, True)])
def test_what_is_drawn_in_captured_steps_is_that_of_plain_ones(repeatable, capsys, members, host):
    device, data = torch.device("cuda"), tiny.data()

    def member(seed: int) -> TrainStep:
        torch.manual_seed(seed)
        method = cd.DML([tiny.drawing(3, host), tiny.drawing(3, host)], 3, image_size=(8, 8))
        return make_step(method, DeviceImages(data.train, data.statistics, device), Augmentation(), tiny.settings())

    plain, fast = ([member(seed) for seed in range(members)] for _ in range(2))
    compare_steps(plain, fast, 10)
    warned = "dml draws random numbers on the host, which a CUDA graph would repeat" in capsys.readouterr().err
    assert warned == host


def compare_steps(plain: list[TrainStep], fast: list[TrainStep], count: int) -> None:
    device, fleet = fast[0].device, make_fleet(fast)
    assert isinstance(fleet, GraphedSteps) or not fast[0].method.capturable
    for number in range(count):
        progress = torch.tensor(number / 20, device=device)
        size = 6 if number % 2 else 8  # two sizes: three plain steps of each, then two graphs take turns
        batches = [
            epoch_indices(24, seed, number, Augmentation(), device, member.method.views).part(0, size)
            for seed, member in enumerate(fast)
        ]
        seeds = [100 * number + index for index in range(len(fast))]
        for member, batch, seed in zip(plain, batches, seeds, strict=True):
            seed_draws(seed, device)
            member(batch, progress)
        fleet(batches, progress, seeds)
    for one, other in zip(plain, fast, strict=True):
        assert one.sums.means() == other.sums.means()
        state = other.method.state_dict()
        for key, tensor in one.method.state_dict().items():
            assert torch.equal(tensor, state[key]), key
