"""A tiny data set and an undisturbed run of it, to compare disturbed runs with."""

from pathlib import Path

import pytest

from codistill.training import trainer as loop

from .. import tiny
from .running import arguments, end_state, evaluate_in_batches, run_here


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> str:
    # The last batch of an epoch is smaller.
    return str(tiny.write_npz(tmp_path_factory.mktemp("colours") / "colours.npz", tiny.data(train=20, test=21)))


@pytest.fixture(scope="session")
def undisturbed(colours: str, tmp_path_factory: pytest.TempPathFactory):
    """The end state of an undisturbed run of a method; evaluated in batches of so many images where that is given."""
    found = {}

    def state(method: str = "mfef", evaluated_in: int | None = None):
        key = (method, evaluated_in)
        if key not in found:
            out: Path = tmp_path_factory.mktemp("undisturbed") / "run"
            with tiny.registered(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop, "write_report", lambda run, summary: None)
                if evaluated_in:
                    evaluate_in_batches(patch, evaluated_in)
                assert run_here(arguments(colours, out, method=method)) == 0
            found[key] = end_state(out)
        return found[key]

    return state
