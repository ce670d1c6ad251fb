"""Protocols and cells: every one is a run that can be built, and has the predictor whose error it is."""

from dataclasses import replace

import pytest

from codistill.core.errors import UsageError
from codistill.settings.build import build_method
from codistill.sweeps.reproduce.cells import completed, contents, digest_of, paper, protocols, tables
from codistill.sweeps.spec import planned

PAPER_TABLES = ("table1", "table2", "table3", "table4", "table5", "figure3", "methods")


def config_of(cell):
    run = planned({**cell.settings, "teacher": cell.teacher and "teacher"}, "", "", lambda key: "")
    assert run.config is not None, run.problem
    return run.config


def test_all_numbers_of_the_paper_are_there():
    numbers = {name: [each for row in paper()[name].get("rows", {}).values() for each in row] for name in tables()}
    assert tables() == [*PAPER_TABLES]
    assert {name: len(each) for name, each in numbers.items() if each} == {
        **{"table1": 98, "table2": 10, "table3": 12, "table4": 12, "table5": 7}
    }
    assert sum(map(float, numbers["table1"])) == pytest.approx(1546.15)
    assert numbers["table2"].count("lost") == 6
    rows = paper()["table1"]["rows"]
    assert dict(zip(paper()["table1"]["columns"], rows["resnet32/cifar100"], strict=True)) == {
        **{"baseline": 30.34, "kd": 29.82, "dml": 26.89, "ffl-s": 27.06, "ffl": 25.56, "mfef-s": 26.36, "mfef": 24.84}
    }


@pytest.mark.parametrize("table", PAPER_TABLES)
def test_every_cell_is_a_run_of_the_paper(table):
    found = contents(table, protocols()["paper"])
    for cell in {each.key: each for each in found.cells}.values():
        train = config_of(cell).train
        if cell.row != "equal compute":
            assert (train.epochs, train.milestones) == (300, (150, 225))
        assert (train.batch_size, train.weight_decay, train.nesterov, train.flip) == (128, 1e-4, True, True)
        assert digest_of(completed(cell.resolved)) == cell.key  # what the ledger has finds its cell


@pytest.mark.parametrize("table", ["table1", "table3", "table4", "table5", "methods"])
def test_every_cell_has_its_predictor(table):
    predictors = {}
    for cell in contents(table, protocols()["paper"]).cells:
        # The network decides nothing about names, so a small one is built, and each method once.
        networks = ["resnet8"] * len(cell.settings["networks"])
        config = config_of(replace(cell, settings={**cell.settings, "networks": networks}))
        key = repr((config.method, config.networks, config.train.ema_decay))
        if key not in predictors:
            averaged = {"student0-ema"} if config.train.ema_decay else set()
            predictors[key] = averaged | build_method(config, 100, (32, 32), fresh=False).predictors().keys()
        assert cell.predictor in predictors[key]


def test_protocols_differ_in_what_they_say():
    def cell(name, column="kd"):
        return next(each for each in contents("table1", protocols()[name], (f"resnet20/cifar100/{column}",)).cells)

    short, small = cell("short"), cell("small")
    assert [short.settings[key] for key in ("epochs", "milestones", "networks")] == [30, [15, 23], ["resnet20"]]
    assert [short.teacher[key] for key in ("epochs", "networks", "method.name")] == [30, ["resnet110"], "independent"]
    assert [small.teacher[key] for key in ("epochs", "networks", "precision")] == [60, ["resnet56"], "auto"]
    assert config_of(cell("small", "mfef")).method.ramp_up == pytest.approx(80 / 300)


def test_a_longer_control_moves_its_milestones():
    cell = next(each for each in contents("methods", protocols()["small"]).cells if each.row == "equal compute")
    assert (cell.settings["epochs"], cell.settings["milestones"]) == (88, [44, 66])


def test_a_protocol_has_only_its_rows():
    assert {cell.row for cell in contents("table1", protocols()["small"]).cells} == {"resnet20/cifar100"}
    with pytest.raises(UsageError, match=r"table2: protocol small is for resnet20 on cifar100 only: .* paper, short"):
        contents("table2", protocols()["small"])


def test_cells_are_chosen_by_rows_or_with_columns():
    chosen = contents("table1", protocols()["paper"], ("resnet32/cifar100/mfef*", "resnet20/cifar10"))
    assert [f"{cell.row}/{cell.column}" for cell in chosen.cells[-2:]] == [
        "resnet32/cifar100/mfef-s",
        "resnet32/cifar100/mfef",
    ]
    assert len(chosen.cells) == 9 and len(chosen.pairs) == 7
    with pytest.raises(UsageError, match="table1 has no cell 'resnet32/cifar': did you mean resnet32/cifar10"):
        contents("table1", protocols()["paper"], ("resnet32/cifar",))
    with pytest.raises(UsageError, match="no cell 'resnet32/cifar10/mfef-x': did you mean resnet32/cifar10/mfef-s or"):
        contents("table1", protocols()["paper"], ("resnet32/cifar10/mfef-x",))


def test_settings_that_decide_nothing_are_free_and_equal_ones_are_equal():
    cell = contents("table1", protocols()["paper"], ("resnet20/cifar10/mfef-s",)).cells[0]
    free = {"evaluate_every": 50, "compile": "off", "deterministic": True, "device": "cpu", "threads": 3}
    assert digest_of(completed({**cell.settings, **free, "seed": 7, "milestones": None, "flip": None})) == cell.key
    assert digest_of(completed({**cell.settings, "padding_mode": "reflect"})) != cell.key
