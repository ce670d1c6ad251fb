"""Every method with the real pairs of the paper's Table 4, one of a zoo, and three of a kind; on the meta device."""

import pytest
import torch

from codistill.core.errors import UsageError
from codistill.methods import METHODS
from codistill.networks import network

PAIRS = [("vgg8", "resnet8x4"), ("resnet32", "wrn-16-2"), ("resnet56", "wrn-40-2"), ("densenet-40-12", "mobilenetv2")]
EACH_PAIR = [pytest.param(pair, marks=[pytest.mark.slow] if number else []) for number, pair in enumerate(PAIRS)]
# One student each: nothing to pair, or exactly a light net and a booster.
TRIPLES = [
    # The contract of methods has three of a kind of each, too, of a tiny network.
    pytest.param(name, marks=[] if name == "mfef" else pytest.mark.slow)
    for name in METHODS
    if METHODS[name].max_students is None
]


def forward(method: str, specs: tuple[str, ...], size: int = 32) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        built = METHODS[method]([network(spec, 100) for spec in specs], 100, image_size=(size, size)).train()
        views = built.views
        images = torch.empty(*([views] if views > 1 else []), 4, 3, size, size)
        outputs = built(images)
        terms = built.losses(outputs, torch.zeros(4, dtype=torch.long), torch.tensor(0.5))
        assert all(term.shape == () for term in terms.values())
        named = built.predictions(built.eval()(torch.empty(4, 3, size, size)))
    assert set(named) == set(built.predictors())
    return [tuple(each.shape) for each in named.values()]


@pytest.mark.parametrize("pair", EACH_PAIR, ids="+".join)
@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].like_students])
def test_unlike_students(method: str, pair: tuple[str, str]) -> None:
    specs = (*pair, pair[0]) if METHODS[method].min_students > 2 else pair
    assert set(forward(method, specs)) == {(4, 100)}


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].like_students])
@pytest.mark.parametrize(
    "pair", [PAIRS[0], ("resnet20", "resnet32"), ("resnet20", "resnet20:shortcut=A")], ids="+".join
)
def test_unlike_students_are_refused_where_all_must_be_the_same(method: str, pair: tuple[str, str]) -> None:
    specs = (*pair, pair[0]) if METHODS[method].min_students > 2 else pair
    with pytest.raises(UsageError, match=f"{method} needs equal students, got {pair[0]} \\+ {pair[1]}.*: name one"):
        forward(method, specs)


@pytest.mark.parametrize("method", TRIPLES)
def test_three_of_a_kind(method: str) -> None:
    assert set(forward(method, ("resnet20",) * 3)) == {(4, 100)}


@pytest.mark.parametrize(
    ("method", "pair"), [*((name, ("resnet20", "mobilenetv2")) for name in ("mfef", "ffl", "dml")), ("mfef", PAIRS[0])]
)
def test_larger_images(method: str, pair: tuple[str, str]) -> None:
    assert set(forward(method, pair, size=64)) == {(4, 100)}


@pytest.mark.parametrize("method", ["mfef", "ffl"])
def test_images_that_are_too_small_name_network_and_size(method: str) -> None:
    from torch import nn

    from codistill.networks import Network, PooledLinear

    valid = Network([nn.Conv2d(3, 8, 9), nn.Conv2d(8, 8, 3)], PooledLinear(8, 100), (8, 8))
    with pytest.raises(UsageError, match=r"stage 0 cannot take 8x8 images"):
        METHODS[method]([valid, network("resnet20", 100)], 100, image_size=(8, 8))
