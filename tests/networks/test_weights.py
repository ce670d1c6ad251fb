"""Weights from files that others have written: matched by name or in order, whole or not at all."""

import dataclasses
import re

import pytest
import safetensors.torch
import torch
from torch import nn

import codistill as cd
from codistill.cli import main
from codistill.core import console
from codistill.core.errors import CheckpointError, UsageError
from codistill.networks.origin import origin_of
from codistill.networks.weights import classifier_of, take
from codistill.settings.build import build_method
from codistill.settings.config import RunConfig, default_config
from codistill.training.train import train_from_config

from .. import tiny
from ..faults.running import at_step

pytestmark = pytest.mark.usefixtures("tiny_registered")


@pytest.fixture(autouse=True)
def said_anew():
    console.note_once.cache_clear()


def drawn(classes: int = 3, seed: int = 1) -> cd.Network:
    torch.manual_seed(seed)
    return cd.network("tiny", classes)


def body(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each for name, each in network.state_dict().items() if name.startswith("stages")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(each, other[name]) for name, each in one.items())


FORMS = {
    "bare": lambda state: state,
    "under a key": lambda state: {"epoch": 3, "model_state": state},
    "of DataParallel": lambda state: {"state_dict": {f"module.{name}": each for name, each in state.items()}},
    "other names in order": lambda state: {
        "net": {f"x.{i}.{n.rpartition('.')[2]}": e for i, (n, e) in enumerate(state.items())}
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_network_begins_with_the_weights_of_a_file(tmp_path, capsys, form):
    source = drawn()
    torch.save(FORMS[form](source.state_dict()), tmp_path / "w.pth")
    built = cd.network("tiny", 3, weights=tmp_path / "w.pth")
    assert same(built.state_dict(), source.state_dict())
    assert built.spec == "tiny" and capsys.readouterr().err == ""
    assert origin_of(next(built.parameters())) is None  # the user's own: a training does not draw them again


@pytest.mark.parametrize("form", FORMS)
def test_a_classifier_for_other_classes_is_drawn_which_is_said_once(tmp_path, capsys, form):
    source = drawn(classes=7)
    torch.save(FORMS[form](source.state_dict()), tmp_path / "w.pth")
    for _ in range(2):
        built = cd.network("tiny", 3, weights=tmp_path / "w.pth")
        assert same(body(built), body(source))
        assert built.head.linear.weight.shape == (3, 8)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(
        r"w\.pth: its classifier is not for 3 classes: head\.linear\.weight and head\.linear\.bias of tiny drawn$", said
    )


def test_a_file_without_a_classifier_serves(tmp_path, capsys):
    source = drawn()
    safetensors.torch.save_file(body(source), tmp_path / "w.safetensors")
    assert same(body(cd.network("tiny", 3, weights=tmp_path / "w.safetensors")), body(source))
    assert "head.linear.bias of tiny drawn" in capsys.readouterr().err


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path):
    def says(content: object, message: str) -> None:
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=rf"^weights .*w\.pth: {message}"):
            cd.network("tiny", 3, weights=tmp_path / "w.pth")

    state = drawn().state_dict()
    says({"epoch": 3}, "holds no weights by name; its keys are epoch")
    says(
        tiny.network(3, width=9).state_dict(),
        r"stages\.2\.0\.weight is \[9, 6, 3, 3\], but network tiny has \[8, .*options\?",
    )
    says({name: each for name, each in state.items() if "stages.2.0" not in name}, "stages.2.1.weight is ")
    says({**state, "more.weight": torch.ones(2)}, "has 18 tensors, but network 17: not that network")
    (tmp_path / "w.pth").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"w\.pth: cannot be read: it is damaged"):
        cd.network("tiny", 3, weights=tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"weights .*none\.pth: no such file"):
        cd.network("tiny", 3, weights=tmp_path / "none.pth")


@pytest.mark.parametrize(("old", "new", "prefix"), [(5, 10, 1), (16, 4, 0), (11, 6, 2)])
def test_position_embeddings_are_interpolated_and_those_of_the_class_stay(tmp_path, old, new, prefix):
    class Positions(nn.Module):
        def __init__(self, tokens: int) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.randn(1, tokens, 3))

    source, target = Positions(old), Positions(new)
    with torch.no_grad():
        source.pos_embed[:, prefix:] = torch.tensor([1.0, 2.0, 3.0])  # constant: so is what is between
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert take(target, {"pos_embed": "pos_embed"}, tmp_path / "w.pth", "w", "it", "") == []
    assert torch.equal(target.pos_embed[:, :prefix], source.pos_embed[:, :prefix])
    torch.testing.assert_close(target.pos_embed[0, prefix:], torch.tensor([[1.0, 2.0, 3.0]]).expand(new - prefix, 3))


def test_the_classifier_is_what_has_an_entry_for_each_class():
    head = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    assert classifier_of(head, 3) == ["head.1.weight", "head.1.bias"]


def config(*weights: str, **settings: object) -> RunConfig:
    return dataclasses.replace(default_config("dml"), networks=("tiny", "tiny"), weights=weights, **settings)


def test_students_of_a_run_begin_with_files_and_everything_else_is_drawn_from_the_seed(tmp_path):
    source = drawn(classes=7)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    method = build_method(config(f"student0={tmp_path / 'w.pth'}"), 3, (8, 8), fresh=True)
    plain = build_method(config(), 3, (8, 8), fresh=True)
    assert same(body(method.cohort[0]), body(source))
    assert torch.equal(method.cohort[0].head.linear.weight, plain.cohort[0].head.linear.weight)
    assert same({"private": method.cohort[1].stages[-1][0].weight}, {"private": plain.cohort[1].stages[-1][0].weight})


def test_a_run_that_is_read_again_needs_no_files():
    build_method(config("student0=/nowhere/w.pth"), 3, (8, 8))


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (["w.pth"], "weights 'w.pth' is no weights of a student: write student0=FILE"),
        (["student0="], "weights 'student0=' is no weights of a student"),
        (["student0=a", "student0=b"], "weights 'student0=b' names student0 twice"),
        (["student2=a"], "there is no student2: the students are student0 to student1"),
        (["student1={file}"], "the 2 stages that all share are student0's: name a file for student0, or set "),
    ],
)
def test_weights_for_nobody_are_refused(tmp_path, weights, says):
    torch.save(drawn().state_dict(), tmp_path / "w.pth")
    given = [each.format(file=tmp_path / "w.pth") for each in weights]
    with pytest.raises(UsageError, match=re.escape(says)):
        build_method(config(*given, method=cd.DML.Settings(shared_stages=2)), 3, (8, 8), fresh=True)


def test_on_the_command_line_and_in_config_json(tmp_path, monkeypatch, no_pages, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.write_npz(tmp_path / "colours.npz", tiny.data())
    source = drawn(classes=7)
    torch.save(source.state_dict(), "w.pth")
    command = ["train", "dml", "--networks", "tiny", "tiny", "--data", "packed", "--data-dir", "colours.npz"]
    command += ["--epochs", "1", "-b", "8", "--lr", "0.00001", "--weights", "student0=w.pth"]
    assert main([*command, "--out", "a"]) == 0
    assert "its classifier is not for 3 classes" in capsys.readouterr().err
    run = cd.Run("a")
    assert run.metadata["weights"] == [f"student0={tmp_path / 'w.pth'}"]
    assert run.metadata["initial_weights"]["from_recipe"]
    trained = run.load_method().cohort[0].stages[0][0].weight
    torch.testing.assert_close(trained, source.stages[0][0].weight, atol=1e-3, rtol=0)
    # The same again from its config.json, and not with another file.
    assert main(["train", "--recipe", "a/config.json", "--out", "b"]) == 0
    assert cd.Run("b").metadata["initial_weights"] == run.metadata["initial_weights"]
    (tmp_path / "w.pth").write_bytes(b"damaged")
    cd.Run("a").load_method()  # which needs no file
    assert main(["train", "--recipe", "a/config.json", "--out", "c"]) == 4
    assert not (tmp_path / "c").exists()


def test_a_run_goes_on_from_its_checkpoint_without_the_file_and_from_the_beginning_with_the_same(tmp_path, no_pages):
    file = tmp_path / "w.pth"
    tiny.write_npz(tmp_path / "colours.npz", tiny.data())
    torch.save(drawn().state_dict(), file)
    begun = config(f"student0={file}", data="packed", data_dir=str(tmp_path / "colours.npz"), train=tiny.settings())
    for step in (1, 5):  # within the first epoch of three steps, and within the second
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            at_step(patch, step, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            train_from_config(begun, tmp_path / f"run{step}", show=False)
    torch.save(drawn(seed=2).state_dict(), file)
    with pytest.raises(CheckpointError, match="no checkpoint yet, and its initial weights are not those that are here"):
        cd.resume(tmp_path / "run1", show=False)
    file.unlink()
    assert cd.resume(tmp_path / "run5", show=False).finished
