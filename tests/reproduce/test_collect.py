"""Tables of runs that are made by hand: marks, differences and pages, with values worked by hand."""

import csv
import io

import pytest

from codistill.evaluation.seeds import summarise
from codistill.sweeps.reproduce.cells import contents, protocols
from codistill.sweeps.reproduce.collect import gather, mark, tables_of, values_of
from codistill.sweeps.reproduce.ledger import Entry
from codistill.sweeps.reproduce.picture import draw
from codistill.sweeps.reproduce.reproduce import rewritten, write_tables

ROW = "resnet20/cifar100"
# Of student0 for seeds 0, 1 and 2. Mean 31, deviation 1, half an interval 4.3027 / sqrt 3 = 2.4842 (t, 2 degrees).
BASELINE = [30.0, 31.0, 32.0]


def entries(errors, protocol="paper", table="table1", rows=(ROW,)):
    """Make runs with the errors of a student by column, 0.5 more of the other and 2 less of the fused classifier."""
    found = []
    for cell in contents(table, protocols()[protocol], rows).cells:
        for seed, error in enumerate(errors.get(cell.column if table == "table1" else cell.row, ())):
            predictors = {"student0": error, "student1": error - 0.5, "ensemble": error - 1, "fused": error - 2}
            predictors |= {"student0-ema": error - 0.2}
            if len(cell.settings["networks"]) == 1:
                predictors = {"student0": error}
            line = {"settings": cell.resolved, "seed": seed, "top1_error": predictors}
            line |= {"precision": "float32" if seed else "bf16", "commit": "" if seed > 1 else "0123456789ab"}
            found.append(Entry(line, "by hand"))
    return found


def rows_of(table):
    return [dict(zip(table.headings, row, strict=True)) for row in table.rows]


@pytest.mark.parametrize(
    ("printed", "errors", "own", "words"),
    [
        (31.08, BASELINE, True, "reproduced"),
        (28.51, BASELINE, True, "worse"),  # the interval is 28.52 to 33.48
        (28.53, BASELINE, True, "reproduced"),
        (33.49, BASELINE, True, "better"),
        (31.08, [31.0], True, "one seed"),
        (31.08, BASELINE, False, "other protocol"),
        (31.08, [], True, "not run"),
        ("lost", BASELINE, True, "lost in the source"),
        ("lost", [], False, "lost in the source"),
        (None, BASELINE, True, ""),
        (None, [], True, "not run"),
    ],
)
def test_a_mark_says_where_the_printed_value_lies(printed, errors, own, words):
    assert mark(printed, summarise(errors) if errors else None, own) == words


def test_a_table_has_the_paper_beside_ours():
    errors = {"baseline": BASELINE, "mfef-s": [25.0, 25.3, 25.2], "dml": [28.0]}
    main, differences = tables_of("table1", protocols()["paper"], gather(entries(errors)), (ROW,))
    cells = {row.pop("cell"): row for row in rows_of(main)}
    common = {"row": ROW, "protocol": "paper's: 300 epochs"}
    assert cells["baseline"] == common | {
        **{"paper": "31.08", "ours": "31.00 ± 1.00", "95 % interval": "28.52 to 33.48", "best of n": "30.00"},
        **{"ours - paper": "\N{MINUS SIGN}0.08", "n": "3", "mark": "reproduced"},
    }
    assert main.notes[-2:] == [
        "Precision, by the number of runs: bf16 3, float32 4.",
        "Commit, by the number of runs: 01234567 5, unknown 2.",
    ]
    assert cells["dml"] == common | {
        **{
            "paper": "29.61",
            "ours": "28.00",
            "95 % interval": "",
            "best of n": "27.50",
            "ours - paper": "\N{MINUS SIGN}1.61",
        },
        **{"n": "1", "mark": "one seed"},
    }
    assert cells["mfef-s"]["mark"] == "better" and cells["mfef-s"]["best of n"] == "24.50"
    assert cells["mfef"]["best of n"] == "23.00"  # that of the fused classifier, from the same runs
    assert (cells["kd"]["ours"], cells["kd"]["n"], cells["kd"]["mark"]) == ("", "0", "not run")
    common = {"of": ROW, "protocol": "paper's: 300 epochs"}
    assert rows_of(differences)[2] == common | {
        **{"first - second": "mfef-s - dml", "pairs": "1", "difference": "\N{MINUS SIGN}3.00", "95 % interval": ""},
        **{"paired t p": "", "sign test p": "1", "paper": "\N{MINUS SIGN}1.15"},
    }
    # 25 - 30, 25.3 - 31, 25.2 - 32: mean -5.8333, deviation 0.9074, half an interval 2.2541, t = -11.135.
    assert rows_of(differences)[1] == common | {
        **{"first - second": "mfef-s - baseline", "pairs": "3", "difference": "\N{MINUS SIGN}5.83"},
        **{"95 % interval": "\N{MINUS SIGN}8.09 to \N{MINUS SIGN}3.58"},
        **{"paired t p": "0.008", "sign test p": "0.25", "paper": "\N{MINUS SIGN}2.62"},
    }
    assert differences.csv().splitlines()[2].split(",")[3:5] == ["-5.83", "-8.09 to -3.58"]  # for programs


def test_another_protocol_is_named_in_every_row_with_a_number_of_the_paper():
    for table in tables_of("table1", protocols()["small"], gather(entries({"baseline": BASELINE}, "small"))):
        assert {row["protocol"] for row in rows_of(table)} <= {"small: 10,000 images, 60 epochs"}
        assert "small: 10,000 images, 60 epochs" in table.title
    main = tables_of("table1", protocols()["small"], gather(entries({"baseline": BASELINE}, "small")))[0]
    assert [row["mark"] for row in rows_of(main)][:2] == ["other protocol", "not run"]
    # Runs of one protocol are no runs of another.
    main = tables_of("table1", protocols()["paper"], gather(entries({"baseline": BASELINE}, "small")), (ROW,))[0]
    assert {row["mark"] for row in rows_of(main)} == {"not run"}


def test_numbers_that_the_source_lost_say_so():
    main, _ = tables_of("table2", protocols()["paper"], {})
    shown = {row["cell"]: (row["paper"], row["mark"]) for row in rows_of(main)[:5]}
    assert shown["ffl"] == ("lost in the source", "lost in the source") and shown["baseline"] == ("18.07", "not run")


def test_seeds_can_be_chosen_and_the_first_of_two_equal_runs_counts():
    cell = contents("table1", protocols()["paper"], (ROW,)).cells[0]
    runs = gather([*entries({"baseline": BASELINE}), *entries({"baseline": [1.0, 1.0, 1.0]})])
    assert values_of(cell, runs) == {0: 30.0, 1: 31.0, 2: 32.0} and values_of(cell, runs, [2, 5]) == {2: 32.0}


def test_methods_are_beside_each_other():
    runs = gather(entries({"independent": BASELINE, "mfef": [29.0, 31.0, 33.0]}, "small", "methods", ()))
    main, differences = tables_of("methods", protocols()["small"], runs)
    cells = {row.pop("method"): row for row in rows_of(main)}
    assert cells["mfef"] == {
        **{"student": "31.00 ± 2.00", "95 % interval": "26.03 to 35.97", "best of n": "28.50"},
        **{"ensemble": "30.00 ± 2.00", "fused": "29.00 ± 2.00", "epochs": "60", "n": "3"},
    }
    assert cells["kd"]["student"] == "not run" and "paper" not in main.headings
    assert [row["first - second"] for row in rows_of(differences)] == [
        "EMA - independent",
        "mfef - independent",
        "EMA - mfef",
    ]


def test_files_in_four_forms(tmp_path):
    runs = gather(entries({"baseline": BASELINE}))
    write_tables(tmp_path / "out" / "t", tables_of("table1", protocols()["paper"], runs, (ROW,)), b"<svg/>")
    names = ["t-differences.csv", "t.csv", "t.html", "t.md", "t.svg", "t.tex"]
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == names
    latex = (tmp_path / "out" / "t.tex").read_text()
    assert r"31.00 $\pm$ 1.00" in latex and r"95 \% interval" in latex and r"\toprule" in latex
    with io.StringIO((tmp_path / "out" / "t.csv").read_text()) as file:
        assert next(csv.DictReader(file))["ours"] == "31.00 ± 1.00"
    page = (tmp_path / "out" / "t.html").read_text()
    assert '<td data-label="mark">reproduced</td>' in page and "data:image/svg+xml;base64," in page


def test_pictures_are_the_same_for_the_same_runs():
    runs = gather(entries({f"{count} students": BASELINE for count in (2, 4)}, "paper", "figure3", ()))
    first, second = (draw("figure3", protocols()["paper"], runs) for _ in range(2))
    assert first == second and first.startswith(b"<?xml") and b"number of students" in first
    assert draw("figure3", protocols()["short"], runs) is None and draw("table1", protocols()["paper"], runs) is None


def test_one_value_is_no_picture():
    runs = gather(entries({"mfef": BASELINE}, "paper", "methods", ("mfef",)))
    assert len(runs) == 1 and draw("methods", protocols()["paper"], runs) is None


def test_a_page_has_the_table_between_its_marks():
    page = "# A\n<!-- ledger: methods small -->\nold\n<!-- /ledger -->\n<!-- ledger: table1 small differences --><!-- x"
    made = rewritten(page, entries({"mfef": BASELINE}, "small", "methods", ()))
    assert "\nold\n" not in made and "| mfef " in made and "31.00 ± 1.00" in made and made.endswith("<!-- x")
    assert rewritten(made, entries({"mfef": BASELINE}, "small", "methods", ())) == made
