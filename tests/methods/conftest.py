"""The methods of the tests: on tiny students, in float64."""

from collections.abc import Callable

import pytest

from codistill.methods import Method
from codistill.methods.kd import WithTeacher

from . import slow


@pytest.fixture
def make(request: pytest.FixtureRequest, tiny_network) -> Callable[..., Method]:
    """Build a module's `METHOD` on tiny students, each of (width, stride of the last stage); by default equal ones."""
    kind: type[Method] = request.module.METHOD
    default = getattr(request.module, "SHAPES", [(8, 2)] * max(2, kind.min_students))

    def build(*shapes: tuple[int, int], **settings) -> Method:
        students = [tiny_network(*shape) for shape in shapes or default]
        return kind(students, 3, kind.Settings(**settings), (8, 8)).double()

    return build


@pytest.fixture
def taught(make, tiny_network) -> Callable[..., Method]:
    """Build a module's `METHOD` as `make` does, beside a frozen teacher of (width, stride of the last stage)."""

    def build(*shapes: tuple[int, int], teacher: tuple[int, int] = (8, 2), **settings) -> Method:
        network = tiny_network(*teacher)
        slow.disturb_norms(network)
        method = WithTeacher(make(*shapes, **settings).float(), network)
        slow.disturb_norms(method)
        return method.double()

    return build
