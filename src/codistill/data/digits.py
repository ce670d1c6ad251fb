"""The embedded data set: 1,797 handwritten digits that come with scikit-learn."""

import numpy as np
from PIL import Image

from codistill.data.dataset import DATASETS, Dataset, Pixels, Split

SIDE = 32  # pixels
TEST_IMAGES = 360


@DATASETS.register("digits")
def digits() -> Dataset:
    """Load scikit-learn's digits: 1,437 for training and 360 for testing, always the same split.

    The 8x8 grey images with values 0 to 16 become 32x32 RGB by bilinear interpolation, which keeps the strokes smooth.

    Returns:
        Images [images, 32, 32, 3], ten classes; `flip` is off, since a mirrored digit is no digit.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998, its test part.
    """
    # Importing scikit-learn takes a second, and listing the data sets imports this file.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    values, labels = load_digits(return_X_y=True)
    images = np.stack([_enlarge(image) for image in values.reshape(-1, 8, 8)])
    parts = train_test_split(np.arange(len(labels)), test_size=TEST_IMAGES, random_state=0, stratify=labels)
    train, test = (Split(images[part], labels[part].astype(np.int64)) for part in parts)
    return Dataset("digits", train, test, tuple("0123456789"), flip=False)


def _enlarge(image: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> Pixels:
    grey = Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8))
    return np.array(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("RGB"))
