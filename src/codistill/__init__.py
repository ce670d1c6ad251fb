"""Online knowledge distillation for PyTorch: train a few small image classifiers together, deploy one.

import codistill as cd
data = cd.dataset("cifar100", root="data")
students = [cd.network("resnet32", data.num_classes), cd.network("wrn-16-2", data.num_classes)]
method = cd.MFEF(students, num_classes=data.num_classes)
run = cd.train(method, data, epochs=300, out="runs/pair")
run.export("student0", "student.onnx")
"""

from codistill.config import TrainSettings
from codistill.data import DATASETS, Dataset, Split, dataset
from codistill.methods import METHODS, Method
from codistill.methods.ffl import FFL
from codistill.methods.independent import Independent
from codistill.methods.mfef import MFEF
from codistill.networks import NETWORKS, Network, network
from codistill.run import VERSION as __version__
from codistill.run import Run
from codistill.train import train

__all__ = [
    "DATASETS",
    "FFL",
    "METHODS",
    "MFEF",
    "NETWORKS",
    "Dataset",
    "Independent",
    "Method",
    "Network",
    "Run",
    "Split",
    "TrainSettings",
    "__version__",
    "dataset",
    "network",
    "train",
]
