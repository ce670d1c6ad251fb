"""Mistakes in a method of one's own: a line that names method, term and place, before a folder is made."""

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import codistill as cd
from codistill.cli import main
from codistill.core.errors import UsageError
from codistill.methods import METHODS
from codistill.networks import NETWORKS

from .. import tiny

pytestmark = pytest.mark.usefixtures("empty_folder")
LABELS = torch.tensor([0, 1, 2, 0])


def ce(outputs: cd.Outputs, labels: Tensor, **options: str) -> Tensor:
    return F.cross_entropy(outputs.logits[0], labels, **options)


def constant(method: cd.Method, outputs: cd.Outputs, value: float) -> Tensor:
    return outputs.logits[0].new_tensor(value)


def mine(losses: Callable[..., object] | None, **more: object) -> cd.Method:
    defined = {} if losses is None else {"losses": losses}
    return type("Mine", (cd.Method,), defined | more)(tiny.own_students(), 3, image_size=(8, 8))


def refused(method: cd.Method, says: str) -> None:
    """Expect one line before a folder is made."""
    with pytest.raises(UsageError, match=says) as caught:
        cd.train(method, tiny.data(), out="run", settings=tiny.settings(), show=False)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("method Mine")
    assert not Path("run").exists()


NO_TERMS: dict[str, tuple[Callable[..., object], str]] = {
    "a vector": (lambda s, o, y, p: {"ce/x": ce(o, y, reduction="none")}, r"term 'ce/x' has the shape \[\d+\], not"),
    "one number in a vector": (lambda s, o, y, p: {"ce/x": ce(o, y)[None]}, r"term 'ce/x' has the shape \[1\]"),
    "a float": (lambda s, o, y, p: {"ce/x": ce(o, y), "kl": 0.0}, "term 'kl' is a float, not a tensor"),
    "whole numbers": (lambda s, o, y, p: {"hits": y.sum()}, "term 'hits' is int64, not a floating-point"),
    "nothing": (lambda s, o, y, p: None, "losses returns nothing: return a dict"),
    "a tensor": (lambda s, o, y, p: ce(o, y), "losses returns a Tensor: return a dict"),
    "a tuple": (lambda s, o, y, p: (ce(o, y), {}), "losses returns a tuple"),
    "no terms": (lambda s, o, y, p: {}, "an empty dict"),
    "no text": (lambda s, o, y, p: {0: ce(o, y)}, "the name of a term is 0"),
    "the name of the sum": (lambda s, o, y, p: {"loss": ce(o, y), "kl": ce(o, y)}, "'loss', which is that of the sum"),
    "no losses": (None, r"method Mine defines no losses\(outputs, labels, progress\)"),
}


@pytest.mark.fault(83)
@pytest.mark.parametrize("form", NO_TERMS)
def test_what_is_no_term_is_named_in_any_loop_and_before_a_run(form):
    losses, says = NO_TERMS[form]
    method = mine(losses)
    with pytest.raises(UsageError, match=says):
        method.losses(method(torch.randn(4, 3, 8, 8)), LABELS, torch.tensor(0.5))
    refused(method, says)


@pytest.mark.fault(83)
@pytest.mark.parametrize(
    ("losses", "says"),
    [
        (lambda s, o, y, p: {"ce": ce(o, y).detach()}, "term 'ce' has no gradient"),
        (lambda s, o, y, p: {"ce": ce(o, y), "kl": ce(o, y).detach()}, "term 'kl' has no gradient"),
        (lambda s, o, y, p: {"ce": ce(o, y), "kl": constant(s, o, math.nan)}, "term 'kl' is nan before any update"),
        (lambda s, o, y, p: {"ce": ce(o, y), "kl": ce(o, y) / 0}, "term 'kl' is inf before any update"),
        (lambda s, o, y, p: {"ce": ce(o, y)} | ({"kl": ce(o, y)} if p > 0 else {}), "term 'kl' is new, but every"),
        (lambda s, o, y, p: {"ce": ce(o, y)} | ({} if p > 0 else {"kl": ce(o, y)}), "term 'kl' is missing, but"),
        (lambda s, o, y, p: {"ce": s.gate(o)}, r"losses fails at test_mistakes\.py:\d+: AttributeError: .*'gate'"),
        (lambda s, o, y, p: {"ce": F.cross_entropy(o.logits[0], y[:2])}, r"losses fails at test_mist\S+:\d+: ValueErr"),
        (lambda s, o, y, p: {"ce": ce(o, y), "kl": 1 / 0}, r"fails at test_mistakes\.py:\d+: ZeroDivisionError"),
    ],
)
def test_terms_that_teach_nothing_change_or_raise(losses, says):
    refused(mine(losses), says)


PARTS: dict[str, tuple[Callable[..., object], str]] = {
    "forward": (lambda self, images: 1 / 0, "forward fails at .*ZeroDivisionError"),
    "parameter_groups": (lambda self: 1 / 0, "parameter_groups fails at"),
    "after_step": (lambda self: 1 / 0, "after_step fails at"),
    "after_epoch": (lambda self: self.average, "after_epoch fails at .*AttributeError"),
    "predictions": (lambda self, outputs: {"mean": outputs.logits[0]}, "only predictors names 'ensemble'"),
    "predictors": (lambda self: 1 / 0, "predictors fails at"),
}


@pytest.mark.fault(83)
@pytest.mark.parametrize("part", PARTS)
def test_all_that_a_method_defines_is_rehearsed(part):
    call, says = PARTS[part]
    refused(mine(lambda s, o, y, p: {"ce": ce(o, y)}, **{part: call}), says)


@pytest.mark.fault(83)
def test_what_may_be_is_trained():
    def losses(self: cd.Method, outputs: cd.Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        kl = ce(outputs, labels) if progress > 0 else torch.zeros(())
        terms = {"ce/student0": ce(outputs, labels), "kl": kl}
        return terms if progress == 0 else dict(reversed(terms.items()))

    method = mine(losses)
    before = {name: each.clone() for name, each in method.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:  # the rehearsal alone changes nothing
        patch.setattr("codistill.training.train.set_up", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cd.train(method, tiny.data(), out="run", settings=tiny.settings(), show=False)
    assert all(torch.equal(each, before[name]) for name, each in method.state_dict().items())
    run = cd.train(method, tiny.data(), out="run", settings=tiny.settings(), show=False)
    assert [row["train"]["kl"] > 0 for row in run.metrics()] == [False, True]
    # What was frozen on purpose has no gradient.
    frozen = mine(lambda s, o, y, p: {f"ce/student{j}": F.cross_entropy(z, y) for j, z in enumerate(o.logits)})
    frozen.cohort[0].requires_grad_(False)
    frozen.cohort[1].requires_grad_(True)
    assert cd.train(frozen, tiny.data(), out="half", settings=tiny.settings(), show=False).finished


@pytest.mark.fault(83)
def test_a_class_that_is_not_registered_trains_under_its_own_name(tiny_registered):
    kind = type("Mine", (cd.Method,), {"losses": lambda s, o, y, p: {"ce": ce(o, y)}})
    run = cd.train(
        kind([cd.network("tiny", 3)], 3, image_size=(8, 8)), tiny.data(), out="run", settings=tiny.settings()
    )
    assert run.summary["method"] == run.metadata["own_method"] == "Mine"
    # Of a class below one of this package, no other name is taken for it either.
    below = type("Below", (cd.DML,), {"losses": lambda s, o, y, p: {"ce": None}})(tiny.own_students(), 3)
    with pytest.raises(UsageError, match="method Below: term 'ce' is a NoneType"):
        cd.train(below, tiny.data(), out="below", settings=tiny.settings(), show=False)


@pytest.mark.fault(83)
def test_what_goes_wrong_later_keeps_what_there_is():
    calls = []

    def losses(self: cd.Method, outputs: cd.Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        calls.append(1)
        terms = {"ce": ce(outputs, labels)}
        return (
            terms if len(calls) < 7 else terms | {"late": ce(outputs, labels)}
        )  # two of the rehearsal, three an epoch

    with pytest.raises(UsageError, match="method Mine: term 'late' is new"):
        cd.train(mine(losses), tiny.data(), out="run", settings=tiny.settings(), show=False)
    run = cd.Run("run")
    assert run.summary["status"] == "failed" and "'late'" in run.summary["error"]
    assert [entry["epoch"] for entry in run.checkpoints.entries()] == [1]


OWN = """
import torch
import torch.nn.functional as F
import codistill as cd
from codistill.methods import METHODS
from codistill.networks import NETWORKS
from tests import tiny

NETWORKS.register("tiny-own")(tiny.network)

@METHODS.register("mine")
class Mine(cd.Method):
    def build(self):
        BUILD
    def losses(self, outputs, labels, progress):
        return {"ce/student0": LOSS}
"""


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run a command with a module of one's own; return its line on stderr, with status 2 and no folder."""
    for registry in (METHODS, NETWORKS):
        monkeypatch.setattr(registry, "_registered", dict(registry))
        monkeypatch.setattr(registry, "_entries", registry._registered)
    monkeypatch.setattr("codistill.core.imports._done", [])
    monkeypatch.syspath_prepend(str(tmp_path))
    tiny.write_npz(tmp_path / "colours.npz", tiny.data())

    def run(source: str, method: str, network: str) -> str:
        (tmp_path / "own0.py").write_text(source)
        flags = ["--networks", network, "--data", "packed", "--data-dir", "colours.npz", "--out", "out"]
        monkeypatch.delitem(sys.modules, "own0", raising=False)
        assert main(["train", method, "--import", "./own0.py", *flags]) == 2
        monkeypatch.delitem(sys.modules, "own0", raising=False)
        out, error = capsys.readouterr()
        assert out == "" and error.count("\n") == 1 and not (tmp_path / "out").exists()
        return error

    return run


@pytest.mark.fault(83)
@pytest.mark.parametrize(
    ("build", "loss", "says"),
    [
        (
            "pass",
            "F.cross_entropy(outputs.logits[0], labels, reduction='none')",
            r"method mine: term 'ce/student0' has",
        ),
        ("pass", "self.gate(outputs)", r"method mine: losses fails at own0\.py:16: AttributeError: .*'gate'"),
        ("1 / 0", "0", r"method mine: its construction fails at own0\.py:14: ZeroDivisionError"),
    ],
)
def test_the_command_line_ends_in_one_line_and_status_2(command, build, loss, says):
    error = command(OWN.replace("BUILD", build).replace("LOSS", loss), "mine", "tiny-own")
    assert re.search(says, error), error


@pytest.mark.fault(84)
def test_an_exception_in_an_imported_module_is_no_bug_of_the_program(command):
    source = """
from codistill.networks import NETWORKS

@NETWORKS.register("broken")
def broken(num_classes: int):
    return [][num_classes]
"""
    error = command(source, "independent", "broken")
    assert re.search(r"error: IndexError at own0\.py:6: list index out of range: fix it there; --debug shows", error), (
        error
    )
