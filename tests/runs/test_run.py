"""Run folders: their files, their lock, and damaged ones."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import codistill as cd
from codistill.core.errors import CheckpointError, UsageError
from codistill.runs import folder as folder_module
from codistill.runs.metadata import checked_metadata
from codistill.settings.build import build_method
from codistill.settings.mapping import RECORDED_KEYS

from .. import tiny

PREDICTORS = ["student0", "student1", "ensemble", "fused"]
EPOCHS = 3


@pytest.fixture(scope="module")
def folder(tiny_registered, tmp_path_factory):
    """The folder of a finished run; to be read only."""
    place = tmp_path_factory.mktemp("run")
    data = cd.dataset("packed", tiny.write_npz(place / "colours.npz", tiny.data()))
    torch.manual_seed(0)
    method = cd.MFEF([cd.network("tiny", 3), cd.network("tiny:width=8", 3)], 3, image_size=(8, 8))
    settings = tiny.settings(epochs=EPOCHS, validation=6)
    cd.train(method, data, out=place / "run", settings=settings, show=False)
    return place / "run"


@pytest.fixture
def copy(folder, tmp_path):
    """A copy that may be damaged."""
    for name, content in tiny.listing(folder).items():
        path = tmp_path / "copy" / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return tmp_path / "copy"


def test_the_summary_has_what_the_design_promises(folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert (summary["method"], summary["networks"]) == ("mfef", ["tiny", "tiny:width=8"])
    assert (summary["data"], summary["seed"], summary["epochs"]) == ("packed", 0, EPOCHS)
    for key in ("top1_error", "best_epoch_top1_error", "parameters"):
        assert list(summary[key]) == PREDICTORS, key
    assert all(0 <= error <= 100 for error in summary["top1_error"].values())
    assert all(isinstance(count, int) and count > 500 for count in summary["parameters"].values())
    assert 0 < summary["train_seconds"] < summary["wall_seconds"]
    assert summary["images_per_second"] == pytest.approx(18 * EPOCHS / summary["train_seconds"])
    environment = summary["environment"]
    assert {"codistill", "python", "torch", "numpy", "platform", "device", "threads"} <= set(environment)
    assert (environment["torch"], environment["codistill"]) == (torch.__version__, cd.__version__)
    assert cd.Run(folder).summary == summary


def test_metrics_are_a_line_an_epoch(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["epoch"] for row in rows] == list(range(EPOCHS))
    for row in rows:
        assert list(row["test"]) == list(row["validation"]) == PREDICTORS
        assert set(row["test"]["fused"]) == {"top1_error", "top5_error", "nll", "ece", "balanced_error"}
        terms = dict(row["train"])
        assert terms.pop("loss") == pytest.approx(sum(terms.values()))
        assert {"ce/student0", "ce/student1", "ce/fused", "kl/fused->student0", "kl/ensemble->fused"} <= set(terms)
        assert row["images_per_second"] == pytest.approx(18 / row["seconds"])
    assert cd.Run(folder).metrics() == rows
    assert rows[-1]["test"]["fused"]["top1_error"] == cd.Run(folder).summary["top1_error"]["fused"]


def test_the_folder_holds_nothing_else(folder):
    names = {name for name in tiny.listing(folder) if "/" not in name}
    expected = {"config.json", "metrics.jsonl", "summary.json", "report.html", "checkpoints", "tensorboard", ".lock"}
    assert names == expected | {"predictions.npz", "report-images.npz"}
    checkpoints = {path.name for path in (folder / "checkpoints").iterdir()}
    assert (
        {"index.json", "epoch-000002.pt", "epoch-000003.pt"}
        <= checkpoints
        <= {
            "index.json",
            *(f"epoch-{epoch:06d}.pt" for epoch in (1, 2, 3)),
        }
    )


def test_tensorboard_can_read_the_events(folder):
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    rows = cd.Run(folder).metrics()
    for tag, values in {
        "train/loss": [row["train"]["loss"] for row in rows],
        "train/learning_rate": [row["learning_rate"] for row in rows],
        "train/kl/fused_to_student1": [row["train"]["kl/fused->student1"] for row in rows],
        "test/student0/top1_error": [row["test"]["student0"]["top1_error"] for row in rows],
        "validation/fused/ece": [row["validation"]["fused"]["ece"] for row in rows],
    }.items():
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx(values)


def test_the_metadata_hold_the_memory_format_that_was_chosen(tmp_path):
    for chosen in ("channels_last", "contiguous_format"):
        method = tiny.method(cd.DML)
        method.memory_format = getattr(torch, chosen)
        settings, execution = tiny.both_settings(epochs=1)
        out = tmp_path / chosen
        run = cd.train(method, tiny.data(), out=out, settings=settings, execution=execution, show=False)
        assert run.metadata["environment"]["memory_format"] == chosen


def test_the_metadata_hold_settings_data_and_environment(folder):
    metadata = json.loads((folder / "config.json").read_text())
    assert metadata["method"]["name"] == "mfef" and metadata["method"]["temperature"] == 3.0
    assert (metadata["networks"], metadata["data"], metadata["epochs"]) == (["tiny", "tiny:width=8"], "packed", EPOCHS)
    assert metadata["data_dir"] == str(folder.parent / "colours.npz")
    assert metadata["dataset"]["class_names"] == ["red", "green", "blue"]
    assert metadata["dataset"]["image_size"] == [8, 8]
    assert (metadata["dataset"]["train_images"], metadata["dataset"]["test_images"]) == (24, 9)
    assert metadata["environment"]["torch"] == torch.__version__


def test_the_config_comes_back(folder):
    config = cd.Run(folder).config
    settings = tiny.settings(epochs=EPOCHS, validation=6)
    assert config.train == settings and config.method == cd.MFEF.Settings()
    assert (config.method_name, config.networks) == ("mfef", ("tiny", "tiny:width=8"))
    assert config.as_mapping() == {
        key: value for key, value in cd.Run(folder).metadata.items() if key not in RECORDED_KEYS
    }


def test_load_method_rebuilds_the_networks(folder):
    run = cd.Run(folder)
    loaded = run.load_method()
    assert not any(module.training for module in loaded.modules())
    state, saved = loaded.state_dict(), run.checkpoints.load().method
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())
    best = run.load_method("best").state_dict()
    assert all(torch.equal(tensor, best[name]) for name, tensor in run.checkpoints.load("best").method.items())


def test_initial_weights_are_a_function_of_the_seed(folder):
    config = cd.Run(folder).config
    first = build_method(config, 3, (8, 8)).state_dict()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = build_method(config, 3, (8, 8)).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", "null", "3", '"x"', "\xff"])
def test_without_a_sound_config_it_is_no_run_folder(copy, content):
    (copy / "config.json").unlink()
    if content is not None:
        (copy / "config.json").write_text(content, encoding="latin-1")
    before = tiny.listing(copy)
    with pytest.raises(CheckpointError, match=r"config\.json: ") as error:
        cd.Run(copy)
    assert "\n" not in str(error.value) and tiny.listing(copy) == before


DAMAGES = [({part: None}, f"damaged: {part} is missing") for part in ("method", "dataset", "environment")]
DAMAGES += [({"dataset": {"mean": None}}, "damaged: dataset name is missing")]
FACTS = {"std": [1.0, 2.0], "mean": 0.5, "class_names": [], "image_size": [8, 0]}


@pytest.mark.parametrize(("change", "words"), [*DAMAGES, *((each, "of the dataset is ") for each in FACTS.items())])
def test_a_config_must_be_whole(folder, change, words):
    metadata = json.loads((folder / "config.json").read_text())
    if isinstance(change, tuple):
        change = {"dataset": {**metadata["dataset"], change[0]: change[1]}}
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{words}"):
        checked_metadata(metadata | change, folder)


@pytest.mark.parametrize("change", [{"learning_rte": 0.1}, {"epochs": "ten"}])
def test_settings_that_this_version_does_not_know_are_a_damaged_file(copy, change):
    metadata = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(metadata | change))
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be used by codistill "):
        _ = cd.Run(copy).config


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl"])
def test_missing_and_damaged_results_are_named(copy, name):
    run = cd.Run(copy)
    read = (lambda: run.summary) if name == "summary.json" else run.metrics
    (copy / name).write_text('{"status": ')
    with pytest.raises(CheckpointError, match=f"{copy}/{name}(:1)?: "):
        read()
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{copy}/{name}: "):
        read()


def test_a_last_line_of_the_metrics_that_a_kill_has_cut_is_left_out(copy):
    rows, path = cd.Run(copy).metrics(), copy / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) > 1
    path.write_text("".join(lines)[:-20])
    assert cd.Run(copy).metrics() == rows[:-1]
    for damaged in ("1\n", '{"epoch": 0, \n', "\n"):
        path.write_text(damaged + "".join(lines[1:]))
        with pytest.raises(CheckpointError, match=rf"{path}:1: damaged: "):
            cd.Run(copy).metrics()


def test_weights_of_other_shapes_are_refused(copy):
    metadata = json.loads((copy / "config.json").read_text())
    metadata["networks"] = ["tiny:width=12", "tiny:width=12"]
    (copy / "config.json").write_text(json.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"the last checkpoint does not fit the networks: .* shape") as error:
        cd.Run(copy).load_method()
    assert "\n" not in str(error.value)


def test_networks_of_ones_own_need_the_program_that_made_them(tmp_path):
    data = cd.dataset("packed", tiny.write_npz(tmp_path / "colours.npz", tiny.data()))
    method = tiny.method()
    (tmp_path / "run").mkdir()  # an empty folder will do
    run = cd.train(method, data, out=tmp_path / "run", settings=tiny.settings(epochs=1), show=False)
    loaded = run.load_method()
    assert loaded is not method  # the caller's own goes on as it is
    assert all(torch.equal(value, method.state_dict()[name]) for name, value in loaded.state_dict().items())
    later = cd.Run(tmp_path / "run")
    assert later.config.networks == ("", "") and later.config.train == tiny.settings(epochs=1)
    with pytest.raises(CheckpointError, match="networks of your own, that have no name"):
        later.load_method()


@pytest.mark.parametrize(
    ("present", "out"), [("out/x", "out"), ("out/.x", "out"), ("out/x/y", "out"), ("out", "out"), ("out", "out/run")]
)
def test_what_is_there_is_not_touched(tmp_path, present, out):
    (tmp_path / present).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / present).write_text("precious")
    before = tiny.listing(tmp_path)
    with pytest.raises(UsageError, match="choose another --out"):
        cd.train(tiny.method(), tiny.data(), out=tmp_path / out, settings=tiny.settings(), show=False)
    assert tiny.listing(tmp_path) == before


def test_the_summary_of_a_finished_run_is_read_once(copy, monkeypatch):
    run, path = cd.Run(copy), copy / "summary.json"
    path.write_text('{"status": "interrupted"}')
    assert run.status == "interrupted"
    path.write_text('{"status": "finished", "seed": 3}')
    assert run.finished and run.summary["seed"] == 3
    monkeypatch.setattr(folder_module, "read_json", lambda path: pytest.fail("read again"))
    assert run.summary["seed"] == 3


def test_a_folder_is_held_as_long_as_it_is_open(copy):
    (copy / "summary.json").unlink()
    method, data = tiny.method(), tiny.data()
    with pytest.raises(ZeroDivisionError), cd.Run.opened(copy, None, method, data) as run:
        with pytest.raises(UsageError, match="in use by pid"), cd.Run.opened(copy, None, method, data):
            pass
        raise ZeroDivisionError
    with cd.Run.opened(copy, None, method, data) as again:
        assert type(again) is cd.Run and again.metadata == run.metadata
    with pytest.raises(UsageError, match="not empty"), cd.Run.opened(copy, run.metadata, method, data):
        pass
