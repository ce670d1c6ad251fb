"""Tables and protocols of a second's training each, in place of those of the package."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codistill.runs.folder import RunFolder
from codistill.sweeps.reproduce import cells
from codistill.sweeps.spec import read_spec
from codistill.sweeps.table import Row
from codistill.training import trainer
from codistill.training.resume import resume
from codistill.training.train import train_from_config

PAPER = """
source = "A paper"
[table1]
caption = "Table 1"
columns = ["baseline", "kd", "mfef-s", "mfef"]
[table1.rows]
"NETWORK/digits" = [50.0, 40.0, 30.0, "lost"]
[methods]
caption = "Methods"
columns = ["student", "ensemble", "fused"]
"""
PROTOCOLS = """
[data.few]
of = "digits"
each = 6
sha256 = { "training images" = "9d" }
[protocols.paper]
about = "paper's: 2 epochs"
teacher = "NETWORK"
settings = { epochs = 2, batch_size = 32, learning_rate = 0.05, milestones = [1], flip = false, train_limit = 64 }
[protocols.short]
about = "short: 1 epoch"
like = "paper"
teacher = "NETWORK"
settings = { epochs = 1, milestones = [] }
[columns]
baseline = { method = "independent", students = 1 }
kd = { method = "kd", students = 1, taught = true }
mfef-s = { method = "mfef" }
mfef = { method = "mfef", predictor = "fused" }
[tables.table1]
pairs = [["mfef-s", "baseline"]]
[tables.methods]
network = "NETWORK"
data = "digits"
against = ["independent"]
[tables.methods.rows]
independent = { method = "independent", students = 1 }
mfef = { method = "mfef" }
cosine = { method = "mfef", schedule = "cosine" }
"""
CACHED = (cells.paper, cells.protocols, cells.contents, cells.rules)


@contextlib.contextmanager
def tables_with(network: str, folder: Path) -> Iterator[None]:
    """Put tables of this network in place of the package's."""
    (folder / "paper.toml").write_text(PAPER.replace("NETWORK", network))
    (folder / "protocols.toml").write_text(PROTOCOLS.replace("NETWORK", network))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "HERE", folder)
        patch.setattr(trainer, "write_report", lambda run, summary: None)
        for each in CACHED:
            each.cache_clear()
        yield
    for each in CACHED:
        each.cache_clear()


@pytest.fixture(scope="module")
def small_tables(tiny_registered: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tables_with("tiny", tmp_path_factory.mktemp("tables")):
        yield


def trained_here(spec: Path, out: Path, **settings: Any) -> list[Row]:
    """Stand in for a sweep: train the runs of a spec one after the other in this process."""
    rows = []
    for run in read_spec(spec):
        folder = out / run.name
        assert run.config is not None
        if not (folder / "config.json").exists():
            train_from_config(run.config, folder, show=False)
        elif not RunFolder(folder).finished:
            with contextlib.suppress(Exception):
                resume(folder, show=False)
        rows.append(Row(name=run.name, group=run.group, folder=str(folder), status="finished"))
    return rows
