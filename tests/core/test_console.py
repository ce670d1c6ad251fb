"""Bars, lines and tables."""

import builtins
import io
import re
import sys
from types import SimpleNamespace

import pytest
import rich.console
from rich.console import Console

from codistill.core import console
from codistill.core.console import TrainingDisplay, duration, summary_table, term_text, track
from codistill.runs.choice import ERRORS


def test_durations():
    texts = {0: "0:00", 59.4: "0:59", 59.6: "1:00", 61: "1:01", 3599: "59:59", 3600: "1:00:00", 90061: "25:01:01"}
    assert {seconds: duration(seconds) for seconds in texts} == texts


def test_the_terms_of_students_stand_side_by_side():
    terms = {"loss": 3.0, "ce/student0": 1.0, "ce/student1": 1.25, "kl/fused->student0": 0.5, "ce/fused": 0.25}
    assert term_text(terms) == "loss 3.000  ce/student 1.000 1.250  kl/fused->student 0.500  ce/fused 0.250"
    assert term_text({}) == ""


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    times = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: times[0])

    def advance(seconds: float) -> None:
        times[0] += seconds

    return advance


@pytest.mark.fault(100)
def test_plain_lines_say_epoch_step_rate_terms_and_time_left(clock, capsys):
    with TrainingDisplay(epochs=4, steps=10, images=1000) as display:
        display.begin_epoch(0)
        clock(5)
        display.step(0, 5, {"loss": 2.0, "ce/student0": 1.0, "ce/student1": 1.0})
        # 500 images in 5 s; 35 of 40 steps to go at a second each.
        line = capsys.readouterr().out
        assert line == "epoch 1/4  step 5/10  100 images/s  loss 2.000  ce/student 1.000 1.000  0:35 left\n"
        clock(5)
        row = {"epoch": 0, "images_per_second": 100.0, "train": {"loss": 1.5}}
        test = {"student0": {"top1_error": 12.5}}
        display.end_epoch({**row, "test": test, "warnings": ["student0 has collapsed"]})
        line, warning = capsys.readouterr().out.splitlines()
        assert line == "epoch 1/4  100 images/s  loss 1.500  test error %: student0 12.50  0:30 left"
        display.end_epoch({**row, "test": test, "validation": {"student0": {"top1_error": 11}}, "warnings": []})
        assert (
            "loss 1.500  validation error %: student0 11.00  test error %: student0 12.50  0:30"
            in capsys.readouterr().out
        )
        assert "warning" in warning and "student0 has collapsed" in warning
        display.begin_epoch(1)
        clock(2)
        display.step(1, 4, {})
        # 400 images in 2 s; 14 of 40 steps took 12 s, so the other 26 take 22.3 s.
        assert capsys.readouterr().out == "epoch 2/4  step 4/10  200 images/s    0:22 left\n"


def test_long_lines_are_not_wrapped(clock, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    with TrainingDisplay(epochs=1, steps=2, images=10) as display:
        display.begin_epoch(0)
        clock(1)
        display.step(0, 1, {f"kl/term{index}/x": 1.0 for index in range(20)})
    assert capsys.readouterr().out.count("\n") == 1


def test_lines_come_every_few_seconds(clock):
    with TrainingDisplay(epochs=1, steps=100, images=100) as display:
        display.begin_epoch(0)
        assert not display.due()
        clock(console.LINE_SECONDS)
        assert display.due()
        display.step(0, 1, {})
        assert not display.due()


def test_a_quiet_display_prints_nothing(clock, capsys):
    with TrainingDisplay(epochs=1, steps=2, images=10, show=False) as display:
        display.begin_epoch(0)
        clock(60)
        display.step(0, 1, {"loss": 1.0})
        display.end_epoch({"epoch": 0, "images_per_second": 1.0, "train": {}, "test": {}, "warnings": []})
        display.console.print("a table")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(clock, capsys, monkeypatch):
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "120")):
        monkeypatch.setenv(name, value)
    with TrainingDisplay(epochs=3, steps=10, images=1000) as display:
        display.begin_epoch(1)
        assert not display.due()
        clock(console.BAR_SECONDS)
        assert display.due()
        clock(5 - console.BAR_SECONDS)
        display.step(1, 5, {"loss": 2.0})
        display._bar.refresh()
        shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert "epoch 2/3" in shown and "step 5/10" in shown and "100 images/s  loss 2.000" in shown


@pytest.mark.fault(100)
@pytest.mark.parametrize("splits", [["test"], ["validation", "test"]], ids=["test", "validation"])
@pytest.mark.parametrize("width", [80, 120])
def test_the_table_is_whole_in_a_terminal_of_any_usual_width(width, splits):
    names = ("student0", "student1", "ensemble", "fused")
    summary = {"method": "mfef", "data": "cifar100", "epochs": 300, "seed": 7, "best_epoch": 299}
    summary |= {"parameters": dict.fromkeys(names, 12_345_678)}
    scores = {"top1_error": 10.0, "top5_error": 2.25, "nll": 0.4567, "ece": 3.5}
    for place, split in enumerate(splits):
        errors = {name: 10.0 + index + 20 * place for index, name in enumerate(names)}
        best = {name: error - 5 for name, error in errors.items()}
        summary |= {ERRORS[split]: errors, f"best_epoch_{ERRORS[split]}": best, split: dict.fromkeys(names, scores)}
    screen = Console(width=width, record=True, file=io.StringIO())
    screen.print(summary_table(summary, ERRORS))
    text = screen.export_text()
    assert "…" not in text
    title = "mfef on cifar100, 300 epochs, seed 7: errors" + (" on the test set" if splits == ["test"] else "")
    assert f"{title}, %" in re.sub(r"\s+", " ", text)
    lines = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in text.splitlines() if "0.4567" in line]
    for index, name in enumerate(names):
        for place, split in enumerate(splits):
            named = [name] if len(splits) == 1 else [name, split]
            errors = [f"{error + index + 20 * place}.00" for error in (10, 5)]
            assert lines.pop(0) == [*named, *errors, "2.25", "3.50", "0.4567", "12,345,678"]


def test_tracked_items_come_through_and_show_nothing_without_a_terminal(capfd):
    assert list(track(iter([1, 2, 3]), "counting", None)) == [1, 2, 3]
    assert capfd.readouterr() == ("", "")


def test_tracked_items_show_a_bar_on_a_terminal(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(track([1, 2, 3], "counting", 3)) == [1, 2, 3]
    out, error = capfd.readouterr()
    assert out == "" and "counting" in error


class NotebookCell(list):
    """The outputs of a cell; a display with an id is replaced by its updates."""

    def display(self, content, *, raw, display_id):
        assert raw and display_id
        self.append(content["text/plain"])
        place = len(self) - 1
        return SimpleNamespace(update=lambda content, raw: self.__setitem__(place, content["text/plain"]))


@pytest.mark.fault(94)
def test_a_notebook_has_one_line_of_progress_in_place(clock, capsys, monkeypatch):
    cell = NotebookCell()
    shell = type("ZMQInteractiveShell", (), {})
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    monkeypatch.setattr(rich.console, "get_ipython", shell, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=cell.display))
    with TrainingDisplay(epochs=2, steps=100, images=1000) as display:
        for epoch in range(2):
            display.begin_epoch(epoch)
            for step in range(1, 101):
                clock(0.3)
                assert display.due()
                display.step(epoch, step, {"loss": 1.0})
            row = {"epoch": epoch, "images_per_second": 100.0, "train": {"loss": 1.5}, "warnings": []}
            display.end_epoch({**row, "test": {"student0": {"top1_error": 12.5}}})
    assert len(cell) == 1 and cell[0].startswith("epoch 2/2  step 100/100  33 images/s  loss 1.000")
    lines = capsys.readouterr().out.splitlines()
    assert [line[:9] for line in lines] == ["epoch 1/2", "epoch 2/2"]


@pytest.mark.fault(94)
def test_a_notebook_that_shows_nothing_costs_nothing(clock, monkeypatch):
    shell = type("ZMQInteractiveShell", (), {})
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", None)
    with TrainingDisplay(epochs=2, steps=100, images=1000) as display:
        display.begin_epoch(0)
        clock(1)
        display.step(0, 1, {})
