"""predictions.npz of a run: what each predictor answered for each image of the splits that are evaluated."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from codistill.core.errors import CheckpointError, DataError, reason
from codistill.core.files import replaced, system_error
from codistill.data.packed import read_array
from codistill.evaluation.predictions import Predictions
from codistill.runs.folder import RunFolder
from codistill.runs.images import write_table

NAME = "predictions.npz"


def write_predictions(folder: Path, predictions: Mapping[str, Predictions]) -> None:
    """Write predictions.npz into a run folder, whole or not at all; `predictions` are by split, those of one state.

    Raises:
        OSError: What the system answers.
    """
    arrays = {
        f"{split}/{name}": array for split, each in predictions.items() for name, array in each.as_arrays().items()
    }
    with replaced(folder / NAME) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def write_predictions_csv(path: Path, predictions: Predictions, class_names: Sequence[str]) -> None:
    """Write a row for each image: its file or its position, the label, and the class and confidence of each predictor.

    Raises:
        OSError: What the system answers; what was there before is kept.
    """
    columns = [
        column
        for each in predictions.predictors.values()
        for column in ([class_names[index] for index in each.named], [f"{share:.6f}" for share in each.confidence])
    ]
    images = map(predictions.place, range(len(predictions)))
    labels = [class_names[label] for label in predictions.labels]
    headings = [f"{name}_{kind}" for name in predictions.predictors for kind in ("class", "confidence")]
    write_table(path, ("image", "label", *headings), zip(images, labels, *columns, strict=True))


def read_predictions(run: RunFolder) -> dict[str, Predictions]:
    """Read predictions.npz of a run: by split, `validation` (if images were held out) and `test`.

    They are those of the last checkpoint, in the order of the class names in config.json.

    Raises:
        CheckpointError: It is absent, as in a run that did not finish, or damaged.
    """
    path, fix = run.path / NAME, f"codistill evaluate {run.path} makes it again"
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            arrays = {name: read_array(archive, path, name, fix) for name in names}
        splits = dict.fromkeys(name.partition("/")[0] for name in names)
        found = {}
        for split in splits:
            own = {
                name.removeprefix(f"{split}/"): each for name, each in arrays.items() if name.startswith(f"{split}/")
            }
            found[split] = Predictions.from_arrays(own, len(run.class_names))
        if "test" not in found:
            raise ValueError("no test images")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file: {fix}") from None
    except DataError as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        raise system_error(error, path, CheckpointError) from None
    except Exception as error:  # whatever zipfile and NumPy raise on bad bytes
        raise CheckpointError(f"{path}: damaged ({reason(error)}): {fix}") from None
    return found
