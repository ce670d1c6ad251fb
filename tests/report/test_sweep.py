"""`codistill report` of a sweep: its groups, what was lost, paired differences, controls, and the files for a paper."""

import csv
import json
import re

import pytest

from codistill.cli.main import main
from codistill.core.errors import CheckpointError, UsageError
from codistill.report.comparison import write_comparison
from codistill.report.differences import control_table, difference_table, p_value, reference_of, signed
from codistill.report.results import numbers, tables
from codistill.report.sources import groups_of
from codistill.runs.folder import RunFolder
from codistill.runs.latency import Cost, Latency, Timing, write_latency

from .written import write_run, write_sweep, write_table

THREE = {
    "dml": {"errors": {"student0": [10.0, 12.0, 14.0], "student1": [11.0, 12.0, 13.0], "ensemble": [9.0, 9.0, 9.0]}},
    "independent": {"errors": {"student0": [11.0, 15.0, 19.0], "student1": [12.0, 13.0, 14.0]}},
}


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path / "sweep", THREE)


def cells(table, name):
    return [row[1:] for row in table.rows if row[0] == name]


def test_errors_have_mean_deviation_count_and_best(sweep):
    errors = tables(groups_of([sweep]))[0]
    assert errors.headings == ["runs", "n", "student0", "student1", "ensemble"]
    assert errors.rows == [
        ["dml", "3", "12.00 ± 2.00 (10.00)", "12.00 ± 1.00 (11.00)", "9.00 ± 0.00 (9.00)"],
        ["independent", "3", "15.00 ± 4.00 (11.00)", "13.00 ± 1.00 (12.00)", ""],
    ]


def test_differences_are_paired_by_seed_against_independent(sweep):
    table = difference_table(groups_of([sweep]))
    assert table.title == "Differences in test error from independent, paired by seed"
    # -1, -3, -5: mean -3, deviation 2, t = -3 / (2 / sqrt 3), 4.303 its 97.5 % point with 2 degrees of freedom.
    # All three of -1, -1, -1 are equal: there is no t.
    assert table.rows == [
        ["dml", "student0", "3", "\N{MINUS SIGN}3.00", "\N{MINUS SIGN}7.97 to +1.97", "0.12", "0.25"],
        ["dml", "student1", "3", "\N{MINUS SIGN}1.00", "\N{MINUS SIGN}1.00 to \N{MINUS SIGN}1.00", "", "0.25"],
    ]


def test_only_seeds_in_common_are_paired(sweep):
    write_run(sweep / "ffl-3", "ffl", 3, {"student0": 1.0})
    write_run(sweep / "kdcl-2", "kdcl", 2, {"student0": 16.5})
    rows = [(f"{group}-seed{seed}", group, "") for group in THREE for seed in range(3)]
    write_table(sweep, [*rows, ("ffl-3", "ffl", ""), ("kdcl-2", "kdcl", "")])
    table = difference_table(groups_of([sweep]))
    assert cells(table, "kdcl") == [["student0", "1", "\N{MINUS SIGN}2.50", "", "", "1"]]
    assert cells(table, "ffl") == [] and "common predictors or seeds: ffl." in table.notes[-1]


def test_runs_with_one_seed_twice_are_not_paired(sweep):
    write_run(sweep / "again", "dml", 2, {"student0": 0.0, "student1": 0.0, "ensemble": 0.0})
    groups = groups_of([*sweep.glob("*-seed?"), sweep / "again"])
    assert sorted((group.name, len(group.runs)) for group in groups) == [("dml", 4), ("independent", 3)]
    assert difference_table(groups) is None


def test_without_independent_the_first_group_is_the_reference(tmp_path):
    folder = write_sweep(tmp_path, {"kdcl": THREE["dml"], "dml": THREE["dml"]})
    assert reference_of(groups_of([folder])).name == "kdcl"


@pytest.mark.parametrize(
    ("value", "text"), [(-0.004, "0.00"), (0.0, "0.00"), (1.005, "+1.00"), (-12.345, "\N{MINUS SIGN}12.35")]
)
def test_differences_have_their_sign(value, text):
    assert signed(value) == text


def test_a_small_p_is_a_bound():
    assert [p_value(each) for each in (None, 0.00099, 0.012345, 1.0)] == ["", "<0.001", "0.012", "1"]


ALONE = {"method": "independent", "networks": ["resnet8"]}
CONTROLLED = {
    "mfef": {"errors": {"student0": [10.0, 11.0], "student1": [0.0, 0.0]}},
    "alone-x": {**ALONE, "errors": {"student0": [12.0, 12.0]}},
    "ema-x": {**ALONE, "ema_decay": 0.999, "errors": {"student0": [0.0, 0.0], "student0-ema": [11.0, 13.0]}},
    "equal-compute-x": {**ALONE, "epochs": 5, "milestones": [3], "errors": {"student0": [9.0, 10.0]}},
    "parameter-matched-x": {"method": "mfef", "networks": ["resnet8"], "errors": {"student0": [10.0, 11.5]}},
    # None of these is one: other settings, another network, more epochs than were measured, another size.
    "alone-y": {**ALONE, "learning_rate": 0.2, "errors": {"student0": [0.0, 0.0]}},
    "alone-z": {**ALONE, "networks": ["wrn-16-2"], "errors": {"student0": [0.0, 0.0]}},
    "parameter-matched-a": {"method": "mfef", "networks": ["resnet8"], "parameters": 9, "errors": {"student0": [0.0]}},
    "equal-compute-y": {**ALONE, "epochs": 9, "errors": {"student0": [0.0, 0.0]}},
}


FACTORS = {
    json.dumps({"method.name": name, "networks": ["resnet8", "resnet8"], "control of": network}): factor
    for name, network, factor in (("dml", "resnet8", 4.5), ("mfef", "wrn-16-2", 4.5), ("mfef", "resnet8", 2.5))
}


def test_methods_stand_beside_their_controls(tmp_path):
    (write_sweep(tmp_path, CONTROLLED) / "controls.json").write_text(json.dumps(FACTORS))
    table = control_table(groups_of([tmp_path]))
    assert [row[:7] for row in table.rows] == [
        ["mfef", "student0", "alone", "10.50", "12.00", "2", "\N{MINUS SIGN}1.50"],
        ["mfef", "student0", "ema", "10.50", "12.00", "2", "\N{MINUS SIGN}1.50"],
        ["mfef", "student0", "equal-compute", "10.50", "9.50", "2", "+1.00"],
        ["mfef", "student0", "parameter-matched", "10.50", "10.75", "2", "\N{MINUS SIGN}0.25"],
    ]


def test_all_numbers_beside_a_control_are_of_the_seeds_that_both_have(tmp_path):
    groups = {**CONTROLLED, "alone-x": {**ALONE, "errors": {"student0": [9.0, 10.0, 14.0, 15.0]}}}
    table = control_table(groups_of([write_sweep(tmp_path, {name: groups[name] for name in ("mfef", "alone-x")})]))
    assert [row[:7] for row in table.rows] == [["mfef", "student0", "alone", "10.50", "9.50", "2", "+1.00"]]


def test_no_control_is_trained_on_other_images(tmp_path):
    groups = {"mfef": CONTROLLED["mfef"], "alone-x": {**CONTROLLED["alone-x"], "test": "1"}}
    assert control_table(groups_of([write_sweep(tmp_path, groups)])) is None


@pytest.mark.parametrize("content", [None, "[1]", "{", '{"no settings": 2.5}'])
def test_without_a_measured_factor_nothing_is_of_equal_compute(tmp_path, content):
    write_sweep(tmp_path, CONTROLLED)
    if content:
        (tmp_path / "controls.json").write_text(content)
    assert [row[2] for row in control_table(groups_of([tmp_path])).rows] == ["alone", "ema", "parameter-matched"]


def test_a_run_of_the_spec_serves_as_the_control_that_it_is(tmp_path):
    independent = {"errors": {"student0": [12.0, 12.0], "student1": [20.0, 21.0]}}
    mixed = {"networks": ["wrn-16-2", "resnet8"]}
    groups = {"dml": {**CONTROLLED["mfef"], **mixed}, "independent": {**independent, **mixed}}
    table = control_table(groups_of([write_sweep(tmp_path, groups)]))
    assert [row[:5] for row in table.rows] == [
        ["dml", "student0 (wrn-16-2)", "alone", "10.50", "12.00"],
        ["dml", "student1 (resnet8)", "alone", "0.00", "20.50"],
    ]


@pytest.mark.fault(171)
def test_what_was_lost_is_named_and_never_averaged(tmp_path, capsys):
    folder = write_sweep(
        tmp_path / "sweep", THREE, {"dml-seed3": "killed by SIGKILL, the last of 3 attempts", "ffl-seed0": ""}
    )
    write_run(folder / "kdcl", "kdcl", 0, {}, "diverged", error="student0 became NaN & infinite")
    rows = json.loads((folder / "table.json").read_text())["runs"]
    write_table(folder, [*(tuple(row.values()) for row in rows), ("kdcl", "kdcl", "")])
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"ok: {folder / 'comparison.html'}\n"
    groups = groups_of([folder])
    assert [row[:3] for row in tables(groups)[0].rows] == [
        ["dml", "3 of 4", ""],
        ["independent", "3", "15.00 ± 4.00 (11.00)"],
        ["ffl", "0 of 1", ""],
        ["kdcl", "0 of 1", ""],
    ]
    assert difference_table(groups) is None
    page = (folder / "comparison.html").read_text(encoding="utf-8")
    section = page[page.index('<h2 id="lost"') : page.index('<h2 id="runs"')]
    assert (
        '<th scope="row">dml-seed3</th><td data-label="why">killed by SIGKILL, the last of 3 attempts</td>' in section
    )
    assert "diverged: student0 became NaN &amp; infinite" in section and "Not begun: ffl-seed0." in section
    assert "3 of the runs have not come to their end" in page and "9 runs · 4 groups" in page


@pytest.mark.fault(171)
def test_a_damaged_run_of_a_sweep_costs_its_group_alone(sweep):
    (sweep / "dml-seed1" / "config.json").write_text("{")
    groups = {group.name: group for group in groups_of([sweep])}
    (lost,) = groups["dml"].lost
    assert lost.name == "dml-seed1" and "config.json: damaged" in lost.reason
    assert groups["independent"].errors("student0") == [11.0, 15.0, 19.0]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{}", "table.json: damaged: KeyError"),
        ('{"runs": [1]}', "table.json: damaged: TypeError"),
        ("[", "table.json: damaged"),
    ],
)
def test_a_damaged_table_is_one_line(sweep, content, line):
    (sweep / "table.json").write_text(content)
    with pytest.raises(CheckpointError, match=line):
        groups_of([sweep])


def test_a_sweep_without_a_finished_epoch_has_no_page(tmp_path):
    with pytest.raises(CheckpointError, match="no run has finished an epoch: there is nothing to report yet"):
        write_comparison([write_table(tmp_path, [("dml", "dml", "")])])
    assert {each.name for each in tmp_path.iterdir()} == {"table.json"}


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_page_has_all_tables_and_the_files_lie_beside_it(tmp_path, seeds):
    groups = {
        name: {**each, "errors": {key: values[:1] * seeds for key, values in each["errors"].items()}}
        for name, each in CONTROLLED.items()
    }
    page = write_comparison([write_sweep(tmp_path / "sweep", groups)], tmp_path / "page.html").read_text(
        encoding="utf-8"
    )
    latex = (tmp_path / "page.tex").read_text(encoding="utf-8")
    found = re.findall(r'<h2 id="compared\d">(.*?)</h2>', page)
    assert found == [
        "Differences in test error from alone-x, paired by seed",
        "Methods beside their controls: test error of a student after the last epoch,\xa0%",
    ]
    assert latex.count(r"\begin{table}") == latex.count(r"\toprule") == 3 and "for \\usepackage{booktabs}" in latex
    assert r"parameter-matched & " in latex and ("$\\pm$" in latex) == (seeds > 1)
    assert "\\end{tabular}" in page and 'href="page.tex"' in page and 'href="page.csv"' in page
    assert 'class="line c0 dashed"' in page  # the seventh of eight groups
    assert ('class="band' in page) == (seeds > 1)


def test_names_are_escaped_for_latex_and_numbers_are_whole(tmp_path):
    groups = {"a_b 50% & c": {**THREE["dml"], "method": "dml"}, "independent": THREE["independent"]}
    page = write_comparison([write_sweep(tmp_path, groups)])
    assert r"a\_b 50\% \& c & 3 & 12.00 $\pm$ 2.00 (10.00)" in page.with_suffix(".tex").read_text(encoding="utf-8")
    with page.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["runs"], row["predictor"]) for row in rows[:3]] == [
        ("a_b 50% & c", name) for name in ("student0", "student1", "ensemble")
    ]
    first = {key: float(rows[0][key]) for key in ("n", "lost", "mean", "deviation", "best", "pairs", "difference")}
    assert first == {"n": 3, "lost": 0, "mean": 12, "deviation": 2, "best": 10, "pairs": 3, "difference": -3}
    assert rows[0]["reference"] == "independent" and rows[2]["reference"] == "" and rows[3]["difference"] == ""
    write_comparison([tmp_path])  # its own files are written again


@pytest.mark.fault(171)
def test_unlike_test_sets_are_not_compared(tmp_path):
    folder = write_sweep(tmp_path, {**THREE, "ffl": {**THREE["dml"], "test": "1"}})
    page = write_comparison([folder]).read_text(encoding="utf-8")
    assert "unlike test sets" in page and "paired by seed" not in page
    assert all(row[9:] == [""] * 7 for row in numbers(groups_of([folder])).rows)


@pytest.mark.fault(171)
@pytest.mark.parametrize("name", ["comparison.csv", "comparison.tex", "comparison.html"])
def test_files_of_others_are_not_overwritten(sweep, name):
    (sweep / name).write_text("mine")
    with pytest.raises(UsageError, match=rf"{name}: is there, and not of codistill report: choose another --out"):
        write_comparison([sweep])
    assert [each.name for each in sweep.glob("comparison.*")] == [name] and (sweep / name).read_text() == "mine"


def test_the_page_does_not_take_the_name_of_what_is_beside_it(sweep, tmp_path):
    with pytest.raises(UsageError, match=r"all\.tex: the tables are written beside the page: end --out in \.html"):
        write_comparison([sweep], tmp_path / "all.tex")


def test_what_was_lost_is_no_point_of_latency_and_single_students_do_not_disagree(tmp_path):
    groups = {**THREE, "kdcl": THREE["dml"], "alone": {**ALONE, "errors": {"student0": [1.0, 2.0]}}}
    folder = write_sweep(tmp_path, groups, {"kdcl-seed3": "gone"})
    for name in ("dml", "kdcl"):
        time = Timing(predictor="student0", runtime="torch", device="cpu", batch=1, threads=1, milliseconds=1.0)
        cost = Cost(parameters=700, flops=90_000, bytes={})
        found = Latency(machine={}, image_size=(8, 8), predictors={"student0": cost}, timings=[time])
        write_latency(RunFolder(folder / f"{name}-seed0"), found)
    page = write_comparison([folder]).read_text(encoding="utf-8")
    assert "dml: student0</title>" in page and "kdcl: student0</title>" not in page
    plot = page[page.index("<figcaption>Disagreement of the students") :].partition("</figure>")[0]
    assert "independent" in plot and "alone" not in plot


def test_latency_is_measured_of_one_finished_run_of_each_group(sweep, monkeypatch):
    write_run(sweep / "dml-seed3", "dml", 3, {}, "diverged")
    rows = [
        (f"{group}-seed{seed}", group, "")
        for group in THREE
        for seed in (3, 0, 1)
        if (group, seed) != ("independent", 3)
    ]
    write_table(sweep, [*rows, ("gone", "gone", "no such network")])
    measured = []

    def measure(run):
        measured.append(run.path.name)
        return Latency(machine={}, image_size=(8, 8), predictors={}, timings=[])

    monkeypatch.setattr("codistill.cli.commands.measure_latency", measure)
    assert main(["report", str(sweep), "--latency"]) == 0
    assert measured == ["dml-seed0", "independent-seed0"]
