"""Online knowledge distillation for PyTorch: train a few small image classifiers together, deploy one.

import codistill as cd
data = cd.dataset("cifar100", root="data")
students = [cd.network("resnet32", data.num_classes), cd.network("wrn-16-2", data.num_classes)]
method = cd.MFEF(students, num_classes=data.num_classes)
run = cd.train(method, data, epochs=300, out="runs/pair")
run.export("student0", "student.onnx")
"""

import importlib.metadata
import os

# Waiting threads of OpenMP spin for long unless told otherwise, and on a busy machine take the cores from those that
# work; threads that sleep at once wake slowly on an idle one. libgomp, which torch has on Linux, knows a middle way,
# others sleep. results/speed-cpu has the measurements. Read when torch is loaded.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}

from codistill.data import DATASETS, Dataset, Split, dataset
from codistill.deploy.run import Run
from codistill.methods import METHODS, Method
from codistill.methods.byot import BYOT
from codistill.methods.cl_ilr import CLILR
from codistill.methods.dml import DML
from codistill.methods.ffl import FFL
from codistill.methods.independent import Independent
from codistill.methods.kd import KD
from codistill.methods.kdcl import KDCL
from codistill.methods.mfef import MFEF
from codistill.methods.okddip import OKDDip
from codistill.methods.one import ONE
from codistill.methods.pcl import PCL
from codistill.methods.rocket import Rocket
from codistill.methods.teacher import WithTeacher
from codistill.networks import NETWORKS, Network, network
from codistill.settings.config import ExecutionSettings, TrainSettings
from codistill.training.train import train

__version__ = importlib.metadata.version("codistill")

__all__ = [
    "BYOT",
    "CLILR",
    "DATASETS",
    "DML",
    "FFL",
    "KD",
    "KDCL",
    "METHODS",
    "MFEF",
    "NETWORKS",
    "ONE",
    "PCL",
    "Dataset",
    "ExecutionSettings",
    "Independent",
    "Method",
    "Network",
    "OKDDip",
    "Rocket",
    "Run",
    "Split",
    "TrainSettings",
    "WithTeacher",
    "__version__",
    "dataset",
    "network",
    "train",
]
