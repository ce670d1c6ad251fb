"""The weights that a run starts from: those of its seed, unless they are its user's own."""

import copy
import json

import pytest
import torch

import codistill as cd
from codistill.cli import main
from codistill.core.errors import CheckpointError
from codistill.methods import METHODS
from codistill.methods.kd import WithTeacher
from codistill.networks.origin import mark
from codistill.settings.build import build_method
from codistill.settings.config import RunConfig
from codistill.training.initial import draw_weights
from codistill.training.verify import end_state

from .. import tiny
from ..faults.running import at_step

pytestmark = [pytest.mark.fault(97), pytest.mark.usefixtures("tiny_registered", "no_pages")]
STUDENTS = {"byot": 1, "okddip": 3, "ffsd": 3, "kd": 1}


def students(count: int = 2) -> list[cd.Network]:
    return [cd.network("tiny", 3) for _ in range(count)]


def made(name: str = "mfef") -> cd.Method:
    return METHODS[name](students(STUDENTS.get(name, 2)), 3, image_size=(8, 8))


def seeded(name: str = "mfef", seed: int = 0) -> cd.Method:
    networks = ("tiny",) * STUDENTS.get(name, 2)
    config = RunConfig(
        method_name=name, networks=networks, train=tiny.settings(seed=seed), method=METHODS[name].Settings()
    )
    return build_method(config, 3, (8, 8))


def weights(module: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}


def changed(module: torch.nn.Module, by: float = 0.25) -> dict[str, torch.Tensor]:
    return {name: tensor + by for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_starts_as_the_command_line_builds_it(name):
    method, expected = made(name), seeded(name, 5)
    torch.rand(7)
    state = torch.get_rng_state()
    described = draw_weights(method, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert weights(method) == weights(expected) != weights(seeded(name, 6))
    assert described["from_recipe"] and described == draw_weights(expected, 5) == draw_weights(method, 5)
    assert described["sha256"] != draw_weights(made(name), 6)["sha256"] and described["trained_in"] == []


@pytest.mark.parametrize("name", ["mfef", "pcl", "one"])
@pytest.mark.parametrize("late", [False, True])
def test_weights_that_a_user_loaded_stay_his(name, late, capsys):
    nets = students()
    own = changed(nets[1])
    if not late:
        nets[1].load_state_dict(own, strict=False)
    method = METHODS[name](nets, 3, METHODS[name].Settings(shared_stages=0), image_size=(8, 8))
    if late:
        method.cohort[1].load_state_dict(own, strict=False)
    assert not draw_weights(method, 0)["from_recipe"]
    said = "weights of student1 stay as set; those of student0 are drawn from seed 0"
    assert capsys.readouterr().err.count(said) == 1
    there = method.cohort[1].state_dict()
    assert all(torch.equal(there[key], value) for key, value in own.items())
    assert weights(method.cohort[0]) == weights(seeded(name).cohort[0])
    if name == "pcl":  # the slow copy of a student starts as its copy
        assert weights(method.means[1]) == weights(method.cohort[1])


def test_one_tensor_of_ones_own_among_drawn_ones():
    method = made()
    with torch.no_grad():
        method.cohort[0].head.linear.bias.fill_(2)
    assert not draw_weights(method, 0)["from_recipe"]
    mine, drawn = weights(method), weights(seeded())
    assert [name for name in mine if mine[name] != drawn[name]] == ["cohort.students.0.head.linear.bias"]


def test_the_weights_of_the_recipe_that_were_loaded_from_a_file_are_those_of_the_recipe():
    method = made()
    method.load_state_dict(copy.deepcopy(seeded().state_dict()))
    assert draw_weights(method, 0)["from_recipe"] and not draw_weights(method, 1)["from_recipe"]


@pytest.mark.parametrize("name", ["mfef", "pcl"])
def test_a_copy_starts_as_what_it_is_a_copy_of(name, tmp_path):
    fresh = copy.deepcopy(copy.deepcopy(made(name)))
    assert draw_weights(fresh, 3)["from_recipe"] and weights(fresh) == weights(seeded(name, 3))
    own = changed(fresh.cohort[1].head)
    fresh.cohort[1].head.load_state_dict(own, strict=False)
    draw_weights(twin := copy.deepcopy(fresh), 4)
    assert all(torch.equal(twin.cohort[1].head.state_dict()[key], value) for key, value in own.items())
    assert weights(twin.cohort[0]) == weights(seeded(name, 4).cohort[0])
    mark(fresh, tmp_path)
    assert draw_weights(copy.deepcopy(fresh), 0)["trained_in"] == [str(tmp_path)]
    assert weights(twin) != weights(fresh)


def test_networks_of_ones_own_stay_and_what_the_method_adds_is_drawn():
    def own(seed: int) -> cd.Method:
        torch.manual_seed(seed)
        return cd.MFEF(tiny.own_students(), 3, image_size=(8, 8))

    methods = [own(1), own(1)]
    stages = [student.stages for student in methods[0].cohort]
    before = weights(methods[0].cohort)
    described = [draw_weights(method, seed) for method, seed in zip(methods, (0, 1), strict=True)]
    assert weights(methods[0].cohort) == weights(methods[1].cohort) == before
    assert weights(methods[0].fusion) != weights(methods[1].fusion)
    assert not described[0]["from_recipe"]
    assert all(now.stages is then for now, then in zip(methods[0].cohort, stages, strict=True))


def test_a_copy_of_a_network_starts_as_its_copy():
    first = cd.network("tiny", 3)
    method = cd.DML([first, copy.deepcopy(first)], 3, cd.DML.Settings(shared_stages=0), image_size=(8, 8))
    copied = weights(method.cohort[1])
    draw_weights(method, 0)
    assert weights(method.cohort[1]) == copied


def test_a_network_that_is_no_longer_what_it_is_called_stays():
    nets = students()
    nets[1].head = torch.nn.Sequential(nets[1].head, torch.nn.Linear(3, 3))
    method = cd.DML(nets, 3, image_size=(8, 8))
    assert not draw_weights(method, 0)["from_recipe"]


def train(method: cd.Method, out: str, **options: object) -> cd.Run:
    settings, execution = tiny.both_settings(epochs=1)
    return cd.train(method, tiny.data(), out=out, settings=settings, execution=execution, show=False, **options)


def test_a_trained_method_is_trained_on_and_that_is_said_and_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    method = made()
    first, second = train(method, "first"), train(method, "second")
    line = "codistill: warning: training goes on from weights of first: make new networks to start from the seed"
    assert capsys.readouterr().err.splitlines() == [line]
    assert first.metadata["initial_weights"] | {"sha256": ""} == {"sha256": "", "from_recipe": True, "trained_in": []}
    assert second.metadata["initial_weights"]["trained_in"] == ["first"]
    assert not second.metadata["initial_weights"]["from_recipe"] and end_state(first) != end_state(second)
    # The same students under another method, and those of a folder.
    third = train(cd.DML(list(method.cohort), 3, image_size=(8, 8)), "third")
    assert third.metadata["initial_weights"]["trained_in"] == ["second"]
    assert train(first.load_method(), "fourth").metadata["initial_weights"]["trained_in"] == ["first"]
    assert len(capsys.readouterr().err.splitlines()) == 2
    # A teacher is none of them.
    taught = WithTeacher(METHODS["kd"](students(1), 3, image_size=(8, 8)), first.load_method().cohort[0])
    assert train(taught, "fifth").metadata["initial_weights"]["from_recipe"]


def test_a_recipe_of_a_run_with_weights_of_its_own_warns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = str(tiny.write_npz(tmp_path / "colours.npz", tiny.data()))
    flags = ["--networks", "tiny", "tiny", "--data", "packed", "--data-dir", data, "--epochs", "1", "-b", "8"]
    assert main(["train", "dml", *flags, "--out", "plain"]) == 0
    own = json.loads((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "own.json").write_text(json.dumps(own | {"initial_weights": {"sha256": "", "from_recipe": False}}))
    capsys.readouterr()
    for recipe, lines in (("plain/config.json", 0), ("own.json", 1)):
        assert main(["train", "--recipe", recipe, "--out", recipe.replace("/", "-") + "d"]) == 0
        assert capsys.readouterr().err.count("its run started from weights of its own") == lines


def test_a_run_without_a_checkpoint_resumes_from_the_weights_that_it_began_with_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, execution = tiny.both_settings(epochs=1)

    def began(out: str, method: cd.Method) -> None:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            at_step(patch, 1, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            cd.train(method, tiny.data(), out=out, settings=settings, execution=execution, show=False)

    torch.manual_seed(4)
    own = cd.DML(tiny.own_students(), 3, image_size=(8, 8))
    again = copy.deepcopy(own)
    began("run", own)
    other = cd.DML(tiny.own_students(), 3, image_size=(8, 8))
    with pytest.raises(CheckpointError, match=r"its initial weights are not those that are here .*hand it in"):
        cd.resume("run", method=other, data=tiny.data(), show=False)
    assert cd.resume("run", method=again, data=tiny.data(), show=False).finished
