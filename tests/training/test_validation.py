"""Validation images: a split that the data set has of its own, or training images that are held out."""

import dataclasses
import json

import numpy as np
import pytest

import codistill as cd
from codistill.core.errors import DataError, UsageError

from .. import tiny
from ..faults.running import arguments, end_state, run_here
from .test_resume import stopped

pytestmark = pytest.mark.usefixtures("tiny_registered", "no_pages")


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> str:
    """Return the path of a packed data set with a validation split."""
    data, own = tiny.data(train=20, test=21), tiny.split(12, 9)
    path = tiny.write_npz(tmp_path_factory.mktemp("validation") / "colours.npz", data)
    with np.load(path) as arrays:
        np.savez(path, **arrays, validation_images=own.images, validation_labels=own.labels)
    return str(path)


def test_a_split_of_its_own_chooses_epoch_and_student_and_resumes_exactly(colours, tmp_path):
    assert run_here(arguments(colours, tmp_path / "whole")) == 0
    cd.resume(stopped(colours, tmp_path / "broken", 3), show=False)
    assert end_state(tmp_path / "broken") == end_state(tmp_path / "whole")
    run = cd.Run(tmp_path / "whole")
    assert run.summary["chosen_by"] == "validation" and run.summary["validation_images"] == 12
    facts = run.metadata["dataset"]
    assert facts["validation_images"] == 12 and "validation images" in facts["sha256"]


def test_no_more_is_held_out_beside_it(colours, tmp_path, capsys):
    assert run_here(arguments(colours, tmp_path / "run", "--validation", "3")) == 2
    said = capsys.readouterr().err
    assert "data set packed has 12 validation images of its own: leave --validation out" in said
    whole = dataclasses.replace(tiny.data(), validation=tiny.split(5, 9))
    with pytest.raises(UsageError, match="data set colours has 5 validation images of its own"):
        cd.train(tiny.method(), whole, settings=tiny.settings(validation=3), out=tmp_path / "other")
    with pytest.raises(DataError, match="train images are 8x8 but validation images are 9x8"):
        dataclasses.replace(whole, validation=tiny.split(5, 9, (9, 8)))


def test_a_run_that_began_with_other_held_out_images_does_not_resume(tmp_path):
    place = str(tiny.write_npz(tmp_path / "colours.npz", tiny.data(train=20, test=21)))
    out = stopped(place, tmp_path / "run", 3, "--validation", "4")
    config = json.loads((out / "config.json").read_text())
    del config["dataset"]["sha256"]["positions of held-out images"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="holds out other validation images than this version: resume it with its own"):
        cd.resume(out, show=False)
