"""The page that a run ends with."""

import html.parser
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch.nn.functional as F

import codistill as cd
from codistill.report.groups import Seen
from codistill.report.page import page_title, run_page, write_report
from codistill.report.pictures import NAME, read_pictures

from .. import tiny

PREDICTORS = ["student0", "student1", "ensemble", "fused"]


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


def parse(page: str) -> Parser:
    parser = Parser()
    parser.feed(page)
    assert parser.open == []
    return parser


def words(parsed: Parser) -> str:
    return " ".join("".join(parsed.text).split())


@pytest.fixture(scope="module")
def parsed(page):
    return parse(page)


def headings(page: str) -> list[str]:
    return re.findall(r'<h2 id="(\w+)"', page)


class Own(cd.Method):
    """A method of one's own, which no name can rebuild."""

    def losses(self, outputs, labels, progress):
        return {f"ce/student{index}": F.cross_entropy(each, labels) for index, each in enumerate(outputs.logits)}


def test_a_method_of_ones_own_that_is_not_registered_has_a_page(tmp_path):
    run = cd.train(tiny.method(Own), tiny.data(), out=tmp_path / "run", settings=tiny.settings(epochs=1), show=False)
    assert {"predictors", "curves", "settings"} <= {*headings((run.path / "report.html").read_text(encoding="utf-8"))}


@pytest.mark.parametrize("data", ["folder", "huggingface", "packed", "table"])
def test_the_title_names_the_place_of_data_of_ones_own(data):
    metadata = {"method": {"name": "dml"}, "dataset": {"name": data}, "data_dir": "/data/birds"}
    assert page_title(Seen(SimpleNamespace(metadata=metadata), {}, [])) == "DML on birds"


def test_every_predictor_has_its_row(run, page):
    table = page[page.index('<h2 id="predictors"') : page.index('<h2 id="curves"')]
    summary, last = run.summary, run.metrics()[-1]
    for name in PREDICTORS:
        row = next(each for each in table.split("<tr>") if f"{name}</th>" in each)
        scores, cells = last["test"][name], dict(re.findall(r'<td data-label="([^"]+)">([^<]*)<', row))
        assert cells["top-1 error\xa0%"] == f"{summary['top1_error'][name]:.2f}"
        assert cells["NLL"] == f"{scores['nll']:.4f}" and cells["ECE\xa0%"] == f"{scores['ece']:.2f}"
        assert cells["balanced\xa0%"] == f"{scores['balanced_error']:.2f}"
        assert cells["parameters"] == f"{summary['parameters'][name]:,}"
        low, high = map(float, cells["95\xa0% interval"].split(" to "))
        assert low <= summary["top1_error"][name] <= high and high - low > 20  # of nine images
        assert ("validation\xa0%" in cells) == bool(run.config.train.validation)
        if run.config.train.validation:
            assert cells["validation\xa0%"] == f"{summary['validation_top1_error'][name]:.2f}"


def test_the_sections_are_there_and_linked(page):
    expected = [
        "next",
        "predictors",
        "curves",
        "wrong",
        "calibration",
        "disagreement",
        "attention",
        "missing",
        "settings",
    ]
    assert headings(page) == expected
    assert re.findall(r'<a href="#(\w+)"', page) == [each for each in expected if each != "missing"]


def test_every_plot_has_a_title_a_description_and_a_table(run, page):
    plots = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    plots = [each for each in plots if 'class="plot"' in each]
    assert len(plots) == 5
    for each in plots:
        assert re.search(r'role="img".*?<title>.+?</title><desc>.+?</desc>', each)
        assert "<details>" in each and "<table>" in each
    errors = plots[0]
    for name in PREDICTORS:
        assert f"<title>{name}</title>" in errors and f"</svg>{name}</li>" in errors
    assert ("student0, validation" in errors) == bool(run.config.train.validation)
    for name in ("sum", "ce/student0", "kl/fused → student1"):
        assert f"<title>{name}</title>" in plots[1]


def test_images_have_a_text_in_their_place(parsed):
    images = [attributes for tag, attributes in parsed.elements if tag == "img"]
    assert images and all("alt" in each for each in images)
    assert any(each["alt"].startswith("Test image of") for each in images)


def test_nothing_is_loaded_from_elsewhere(parsed, page):
    for tag, attributes in parsed.elements:
        assert tag not in ("script", "iframe", "image", "object", "embed"), tag
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "srcset"):
                assert value.startswith(("#", "data:")), (tag, name, value)
    assert "@import" not in page and "url(" not in page
    assert len(page) < 200_000


def test_a_small_screen_and_a_dark_one_are_thought_of(page):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "@media (prefers-color-scheme: dark)" in page


def test_the_settings_are_whole_and_names_are_escaped(run, parsed, page):
    assert "<colours>" not in page
    assert "MFEF on <colours> & more" in words(parsed)
    listed = dict(re.findall(r'<th scope="row">([\w. ]+)</th><td>(.*?)</td>', page[page.index('<h2 id="settings"') :]))
    for key, value in run.metadata.items():
        for each in value if isinstance(value, dict) else ():
            assert f"{key}.{each}" in listed or isinstance(value[each], dict) or key == "method"
    assert (
        listed["method.temperature"] == "3"
        and listed["batch_size"] == "8"
        and listed["epochs"] == str(run.config.train.epochs)
    )
    assert "epochs" in words(parsed).partition("Other than by default")[2]
    assert "{&#34;" not in page  # no dump


@pytest.mark.fault(100)
def test_it_says_what_epoch_and_student_were_chosen_on(run, parsed):
    text = words(parsed)
    if run.config.train.validation:
        assert "chosen on 8 validation images held out of the training set" in text
        assert re.search(r"Best student: student\d, chosen by validation error \(\S+ % of 8 images\); its test", text)
    else:
        assert re.search(r"Best student: student\d, chosen by test error, so its \S+ % is too optimistic", text)
        assert "on this test set, which flatters it" in text


def test_it_can_be_written_again_from_the_folder_alone(run, page):
    write_report(cd.Run(run.path), cd.Run(run.path).summary)
    assert (run.path / "report.html").read_text() == page


def test_pictures_are_those_of_the_test_set(run):
    pictures, test = read_pictures(run.path), tiny.data().test
    assert pictures is not None and 0 < len(pictures.positions) <= len(test)
    assert (pictures.images == test.images[pictures.positions]).all()
    assert set(pictures.places) == {"student0", "student1", "fused"}
    student = pictures.places["student0"]
    assert student.shape == (len(pictures.attended), 4, 4) and ((student > 0) & (student < 1)).all()
    assert pictures.channels["fused"].shape == (len(pictures.attended), 16)
    mean = (student.astype(float) + pictures.places["student1"]) / 2
    assert np.allclose(pictures.places["fused"], mean, atol=1e-3)


@pytest.mark.parametrize(("kind", "kept"), [("channel", "channels"), ("spatial", "places")])
def test_attention_of_channels_or_of_places_alone(tmp_path, kind, kept):
    method = tiny.method(cd.MFEF, attention=kind)
    run = cd.train(method, tiny.data(), out=tmp_path / "run", settings=tiny.settings(epochs=1), show=False)
    page, pictures = (run.path / "report.html").read_text(), read_pictures(run.path)
    shown = {each: set(getattr(pictures, each)) for each in ("channels", "places")}
    assert shown == {"channels": set(), "places": set()} | {kept: {"student0", "student1", "fused"}}
    assert "attention" in headings(page)
    section = page.partition('id="attention"')[2].partition("<h2")[0]
    assert ('class="strip"' in section) == (kind == "channel")
    assert ("weights the channels of its last" in section) == (kind == "channel")
    assert ("here laid over the image" in section) == (kind == "spatial")
    assert 'src=""' not in section and "None" not in section


def test_a_method_without_attention_has_no_section_of_it(tmp_path):
    run = cd.train(tiny.method(cd.DML), tiny.data(), out=tmp_path / "run", settings=tiny.settings(epochs=1), show=False)
    page = (run.path / "report.html").read_text()
    assert "attention" not in headings(page) and "disagreement" in headings(page)
    assert read_pictures(run.path).places == {}


def copied_without(run, folder, *names):
    for each in run.path.iterdir():
        if each.is_file() and each.name not in (*names, ".lock"):
            (folder / each.name).write_bytes(each.read_bytes())
    return cd.Run(folder)


@pytest.mark.fault(53)
@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 no archive", b"\0" * 1000])
def test_a_run_without_predictions_or_pictures_still_has_a_page(run, tmp_path, content):
    old = copied_without(run, tmp_path, "predictions.npz", NAME)
    for name in ("predictions.npz", NAME) if content is not None else ():
        (tmp_path / name).write_bytes(content)
    page = run_page(old)
    assert headings(page) == ["next", "predictors", "curves", "missing", "settings"]
    assert f"codistill evaluate {tmp_path} makes it again" in page
    parse(page)


@pytest.mark.fault(53)
def test_a_run_that_did_not_finish_says_so(run, tmp_path):
    old = copied_without(run, tmp_path, "summary.json")
    page = run_page(old)
    assert f"This run is not finished. <code>codistill resume {tmp_path}</code> continues it." in page
    (tmp_path / "summary.json").write_text(json.dumps({"status": "diverged", "error": "the loss is NaN"}))
    assert "This run is diverged: the loss is NaN." in (page := run_page(cd.Run(tmp_path)))
    assert " 0 images held out" not in page
    assert ("validation: images held out of the training set" in page) == bool(run.config.train.validation)
    nothing = r"no epoch has been finished \(the loss is NaN\): there is nothing to report"
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(cd.CodistillError, match=nothing):
        run_page(cd.Run(tmp_path))
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(cd.CodistillError, match=nothing):
        run_page(cd.Run(tmp_path))


@pytest.mark.fault(53)
def test_a_drawing_that_fails_costs_a_warning_and_no_more(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no <fonts>\nfound")

    monkeypatch.setattr("codistill.report.page.charts", fail)
    monkeypatch.setattr("codistill.training.trainer.keep_pictures", fail)
    run = cd.train(tiny.method(), tiny.data(), out=tmp_path / "run", settings=tiny.settings(epochs=1), show=False)
    assert run.finished and cd.Run(run.path).summary["status"] == "finished"
    page = (run.path / "report.html").read_text()
    assert "Curves: making it failed (RuntimeError: no &lt;fonts&gt; found)" in page
    assert "curves" not in headings(page) and "attention" not in headings(page)
    pictures, drawing = capsys.readouterr().err.splitlines()
    assert all(
        each.startswith("codistill: warning: ") and "RuntimeError: no <fonts> found" in each
        for each in (pictures, drawing)
    )
    assert "codistill report makes them" in pictures


def test_terms_that_are_zero_or_huge_can_be_drawn(run, tmp_path):
    old = copied_without(run, tmp_path, "metrics.jsonl")
    (row, *_) = run.metrics()
    rows = [{**row, "epoch": epoch, "train": {"loss": 0.0, "ce/student0": 10.0**epoch}} for epoch in range(30)]
    for each in rows[1::7]:  # these were not evaluated
        del each["test"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert "curves" in headings(run_page(old))


def test_the_terms_of_both_stages_are_drawn(run, tmp_path):
    old = copied_without(run, tmp_path, "metrics.jsonl")
    (row, *_) = run.metrics()
    stages = ({"loss": 2.0, "flow/teacher->student0": 2.0}, {"loss": 1.0, "ce/student0": 1.0})
    rows = [{**row, "epoch": epoch, "train": stages[epoch > 1]} for epoch in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    page = run_page(old)
    assert "flow/teacher → student0" in page and "ce/student0" in page
