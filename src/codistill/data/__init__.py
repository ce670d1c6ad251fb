"""Image data sets as arrays of uint8 pixels; one data set a file."""

from codistill.data.dataset import DATASETS, Dataset, Split, dataset

__all__ = ["DATASETS", "Dataset", "Split", "dataset"]
