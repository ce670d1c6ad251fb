"""The page that a run ends with."""

import html.parser
import json
import os
import re
import subprocess
import sys

import pytest

import codistill as cd
from codistill.report.figures import curves
from codistill.report.page import write_report

from .. import tiny


@pytest.fixture(scope="module", params=["plain", "validation, one epoch"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    changes = {"epochs": 2, "validation": 0} if request.param == "plain" else {"epochs": 1, "validation": 8}
    data = tiny.data(name="<colours> & more")
    return cd.train(tiny.method(), data, out=folder / "run", settings=tiny.settings(**changes), show=False)


@pytest.fixture(scope="module")
def page(run):
    return (run.path / "report.html").read_text(encoding="utf-8")


class Parser(html.parser.HTMLParser):
    """Collects elements, and complains where they are not nested."""

    void = ("meta", "br", "link", "img", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def parsed(page):
    parser = Parser()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_every_predictor_has_its_row(run, page, parsed):
    cells = re.findall(r"<td>(.*?)</td>", page)
    summary, predictors = run.summary, ["student0", "student1", "ensemble", "fused"]
    expected = []
    for name in predictors:
        for split, key in (("validation", "validation_top1_error"), ("test", "top1_error")):
            if split == "validation" and not run.config.train.validation:
                continue
            scores = summary[split][name]
            named = [name, split] if run.config.train.validation else [name]
            errors = [f"{summary[each][name]:.2f}" for each in (key, f"best_epoch_{key}")]
            numbers = [f"{scores['top5_error']:.2f}", f"{scores['nll']:.4f}", f"{scores['ece']:.2f}"]
            expected += [*named, *errors, *numbers, f"{summary['parameters'][name]:,}"]
    assert cells == expected


def test_the_curves_are_drawn_and_named(run, parsed, page):
    assert sum(tag == "svg" for tag, _ in parsed.elements) == 1
    drawing = page[page.index("<svg") : page.index("</svg>")]
    for name in ("student0", "student1", "ensemble", "fused", "loss", "ce/student0", "kl/fused → student1"):
        assert f"<!-- {name} -->" in drawing, name
    held_out = run.config.train.validation
    what = "top-1 error, %: test solid, validation dashed" if held_out else "top-1 error on the test set, %"
    for label in (what, "training loss and its terms, nats", *(["fused (validation)"] if held_out else [])):
        assert f"<!-- {label} -->" in drawing, label


def test_nothing_is_loaded_from_elsewhere(parsed, page):
    for tag, attributes in parsed.elements:
        assert tag not in ("script", "link", "img", "iframe", "image", "object", "embed"), tag
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "srcset"):
                assert value.startswith("#"), (tag, name, value)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_the_settings_are_whole_and_names_are_escaped(run, parsed, page):
    assert "<colours>" not in page
    text = "".join(parsed.text)
    assert "mfef on <colours> & more" in text
    shown = json.loads(text[text.index("{\n") : text.rindex("}") + 1])
    assert shown == {key: value for key, value in run.metadata.items() if key != "dataset"}


@pytest.mark.fault(100)
def test_it_says_what_epoch_and_student_were_chosen_on(run, parsed):
    text = " ".join("".join(parsed.text).split())
    if run.config.train.validation:
        assert "chosen on 8 validation images held out of the training set" in text
        assert re.search(r"best student: student\d, chosen by validation error \(\S+ % of 8 images\); its test", text)
    else:
        assert re.search(r"best student: student\d, chosen by test error, so its \S+ % is too optimistic", text)
        assert "on this test set, which flatters it" in text


def test_it_can_be_written_again_from_the_folder_alone(run, tmp_path):
    before = (run.path / "report.html").read_text()
    write_report(cd.Run(run.path), cd.Run(run.path).summary)

    def without_ids(text: str) -> str:
        return re.sub(r"(#|id=\"|<dc:date>)[^\")<]*", "", text)

    assert without_ids((run.path / "report.html").read_text()) == without_ids(before)


def test_terms_that_are_zero_or_huge_can_be_drawn():
    scores = {"student0": {"top1_error": 100.0}}
    rows = [{"epoch": epoch, "train": {"loss": 0.0, "ce/student0": 10.0**epoch}} for epoch in range(30)]
    for row in rows[6::7]:  # the others were not evaluated
        row["test"] = scores
    assert curves(rows).startswith("<svg")


@pytest.mark.fault(53)
def test_drawing_ignores_the_settings_of_matplotlibs_user(run):
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "font.family": "no such font", "axes.facecolor": "red"}):
        assert curves(run.metrics()).startswith("<svg")
        assert matplotlib.rcParams["text.usetex"]


@pytest.mark.fault(53)
def test_a_backend_that_is_not_there_is_no_matter():
    program = "import os; from codistill.report.figures import curves; " + (
        "row = {'epoch': 0, 'test': {'student0': {'top1_error': 1.0}}, 'train': {'loss': 1.0}}; "
        "assert curves([row]).startswith('<svg') and os.environ['MPLBACKEND'] == 'module://none.backend'"
    )
    environment = {**os.environ, "MPLBACKEND": "module://none.backend"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=60)


@pytest.mark.fault(53)
def test_a_drawing_that_fails_costs_a_warning_and_no_more(tmp_path, monkeypatch, capsys):
    def fail(rows):
        raise RuntimeError("no <fonts>\nfound")

    monkeypatch.setattr("codistill.report.page.curves", fail)
    run = cd.train(tiny.method(), tiny.data(), out=tmp_path / "run", settings=tiny.settings(epochs=1), show=False)
    assert run.finished and cd.Run(run.path).summary["status"] == "finished"
    assert "The drawing failed (RuntimeError: no &lt;fonts&gt; found)" in (run.path / "report.html").read_text()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("codistill: warning: ") and "RuntimeError: no <fonts> found" in line
