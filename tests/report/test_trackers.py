"""TensorBoard and the trackers that are asked for; the real libraries, where they are installed, in the second tier."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import codistill as cd
from codistill.report import trackers
from codistill.runs.saving import Saver
from codistill.training import trainer as loop

from .. import tiny
from ..faults.running import arguments, run_here

pytestmark = pytest.mark.usefixtures("tiny_registered", "no_pages")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop, "keep_pictures", lambda *arguments: None)


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> str:
    return str(tiny.write_npz(tmp_path_factory.mktemp("trackers") / "colours.npz", tiny.data(train=20, test=21)))


def real(name: str) -> pytest.MarkDecorator:
    """Skip a test where a library, or what it needs, is not installed."""
    needs = {"trackio": ("trackio", "gradio_client")}.get(name, (name,))
    absent = [each for each in needs if importlib.util.find_spec(each) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


class Told:
    """What a pretended library was told."""

    def __init__(self) -> None:
        self.opened: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.ended = 0

    def init(self, **options):
        self.opened.append(options)
        return self

    def log(self, numbers, step=None):
        self.logged.append((numbers.get("epoch") if step is None else step, numbers))

    def finish(self):
        self.ended += 1

    def Settings(self, **options):
        return options


@pytest.fixture
def pretended(monkeypatch):
    """Pretend that trackio and wandb are installed."""
    told = {name: Told() for name in ("trackio", "wandb")}
    for name, each in told.items():
        monkeypatch.setitem(sys.modules, name, each)
    monkeypatch.setattr("codistill.training.prepare.refuse_missing", lambda where, package: None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return told


def test_trackers_are_told_of_each_epoch_and_of_the_result(colours, tmp_path, pretended):
    out = tmp_path / "runs" / "one"
    assert run_here(arguments(colours, out, "--track", "wandb", "trackio")) == 0
    last = cd.Run(out).metrics()[-1]
    for told in pretended.values():
        assert [step for step, _ in told.logged] == [1, 2, 2]
        assert told.logged[1][1]["test/student0/top1_error"] == last["test"]["student0"]["top1_error"]
        assert told.logged[1][1]["train/kl/fused_to_student0"] == last["train"]["kl/fused->student0"]
        assert told.logged[2][1]["result/student0"] == last["test"]["student0"]["top1_error"]
        assert told.ended == 1 and len(told.opened) == 1
        assert told.opened[0]["config"]["method.temperature"] == 3.0 and told.opened[0]["config"]["epochs"] == 2
    assert pretended["wandb"].opened[0]["mode"] == "offline" and pretended["trackio"].opened[0]["project"] == "runs"
    assert cd.Run(out).config.execution.track == ("wandb", "trackio")


def test_a_tracker_that_fails_costs_one_line(colours, tmp_path, pretended, monkeypatch, capsys):
    def failing(**options):
        raise RuntimeError("database is\nlocked")

    monkeypatch.setattr(pretended["trackio"], "init", failing)
    assert run_here(arguments(colours, tmp_path / "run", "--track", "trackio")) == 0
    line = f"codistill: warning: {tmp_path / 'run'}: trackio not written: database is locked; training goes on"
    assert capsys.readouterr().err.count(line) == 1
    assert cd.Run(tmp_path / "run").finished


def test_what_is_not_installed_is_refused_before_anything_is_written(colours, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_here(arguments(colours, tmp_path / "run", "--track", "wandb")) == 2
    assert "track wandb: the package wandb is not installed here: " in capsys.readouterr().err
    assert run_here(arguments(colours, tmp_path / "run", "--track", "wandbb")) == 2
    assert "track is 'wandbb': did you mean wandb?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_nothing_is_imported_unasked(colours, tmp_path):
    before = {"trackio", "wandb", "mlflow"} & sys.modules.keys()
    assert run_here(arguments(colours, tmp_path / "run")) == 0
    assert {"trackio", "wandb", "mlflow"} & sys.modules.keys() == before


def test_tensorboard_has_images_confusions_and_hparams(colours, tmp_path):
    assert run_here(arguments(colours, tmp_path / "run", "--validation", "4", "--padding", "0", "--flip", "False")) == 0
    run = cd.Run(tmp_path / "run")
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"images": 0}).Reload()
    student = run.summary["best_student"]
    assert set(events.Tags()["images"]) == {"train/first batch", f"test/confusion of {student}"}
    grid = events.Images("train/first batch")[0]
    assert grid.width * grid.height == 8 * 8 * 8  # the images of a batch
    assert events.Scalars("result/student0")[0].value == pytest.approx(run.summary["top1_error"]["student0"])
    assert any("hparams" in name for name in events.summary_metadata)


@pytest.mark.slow
def test_the_images_are_those_that_the_networks_see(colours, tmp_path, monkeypatch):
    seen, tell = [], Saver.tell
    monkeypatch.setattr(Saver, "tell", lambda self, what, about: (seen.append((what, about)), tell(self, what, about)))
    assert run_here(arguments(colours, tmp_path / "run", "--padding", "0", "--flip", "False")) == 0
    pixels = dict(seen)["pictures"]
    own = cd.Run(tmp_path / "run").load_data().train.images
    assert pixels.dtype == np.uint8 and {each.tobytes() for each in pixels} <= {each.tobytes() for each in own}


def test_a_confusion_matrix_is_drawn_with_labels_in_rows(monkeypatch):
    test = SimpleNamespace(
        labels=np.array([0, 0, 1, 1]), predictors={"student0": SimpleNamespace(named=np.array([0, 1, 1, 1]))}
    )
    monkeypatch.setattr(trackers, "read_predictions", lambda run: {"test": test})
    drawn = trackers.confusion_picture(SimpleNamespace(class_names=["a", "b"]), "student0")
    assert drawn.shape == (400, 400)
    assert drawn[::200, ::200].tolist() == [[128, 128], [255, 0]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of other libraries
@real("mlflow")
def test_mlflow_itself(colours, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert run_here(arguments(colours, tmp_path / "run", "--track", "mlflow")) == 0
    assert run_here(["resume", str(tmp_path / "run"), "--epochs", "3"]) == 0
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("codistill").experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    history = client.get_metric_history(found.info.run_id, "test/student0/top1_error")
    rows = cd.Run(tmp_path / "run").metrics()
    assert {each.step: each.value for each in history} == {
        row["epoch"] + 1: row["test"]["student0"]["top1_error"] for row in rows
    }
    assert found.data.params["method.temperature"] == "3.0"
    assert not (Path.cwd() / "mlruns").exists() and not (Path.cwd() / "mlflow.db").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of other libraries
@real("wandb")
def test_wandb_itself_offline(colours, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert run_here(arguments(colours, tmp_path / "run", "--track", "wandb")) == 0
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (written,) = folder.glob("*.wandb")
    assert b"test/student0/top1_error" in written.read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of other libraries
@real("trackio")
def test_trackio_itself(colours, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    assert run_here(arguments(colours, tmp_path / "run", "--track", "trackio")) == 0
    assert any((tmp_path / "trackio").rglob("*.db"))
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "finished"
