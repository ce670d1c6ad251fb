"""Online knowledge distillation for PyTorch: train a few small image classifiers together, deploy one.

import codistill as cd
data = cd.dataset("cifar100", root="data")
students = [cd.network("resnet32", data.num_classes), cd.network("wrn-16-2", data.num_classes)]
method = cd.MFEF(students, num_classes=data.num_classes)
run = cd.train(method, data, epochs=300, out="runs/pair")
run.export("student0", "student.onnx")
"""

import importlib
import importlib.metadata
import os
from typing import TYPE_CHECKING, Any

# Waiting threads of OpenMP spin for long unless told otherwise, and on a busy machine take the cores from those that
# work; threads that sleep at once wake slowly on an idle one. libgomp, which torch has on Linux, knows a middle way,
# others sleep. results/speed-cpu has the measurements. Read when torch is loaded.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}

if TYPE_CHECKING:
    from codistill import modules
    from codistill.core.errors import CodistillError
    from codistill.data import DATASETS, Dataset, Split, dataset
    from codistill.deploy.classifier import Classifier, load_classifier
    from codistill.deploy.predict import predict
    from codistill.deploy.run import Run
    from codistill.methods import METHODS, Method, MethodSettings, ParameterGroup, losses
    from codistill.methods.ab import AB
    from codistill.methods.ahbf import AHBF
    from codistill.methods.at import AT
    from codistill.methods.byot import BYOT
    from codistill.methods.cd import CD
    from codistill.methods.cl_ilr import CLILR
    from codistill.methods.cohort import Outputs
    from codistill.methods.dml import DML
    from codistill.methods.ffl import FFL
    from codistill.methods.ffsd import FFSD
    from codistill.methods.fitnets import FitNets
    from codistill.methods.fsp import FSP
    from codistill.methods.independent import Independent
    from codistill.methods.kd import KD, WithTeacher
    from codistill.methods.kdcl import KDCL
    from codistill.methods.kdgan import KDGAN
    from codistill.methods.l_mcl import LMCL
    from codistill.methods.mcl import MCL
    from codistill.methods.mfef import MFEF
    from codistill.methods.okd_cheap import OKDCheap
    from codistill.methods.okddip import OKDDip
    from codistill.methods.okdph import OKDPH
    from codistill.methods.one import ONE
    from codistill.methods.pcl import PCL
    from codistill.methods.rocket import Rocket
    from codistill.methods.switokd import SwitOKD
    from codistill.methods.takd import TAKD
    from codistill.networks import NETWORKS, Network, network, network_from
    from codistill.runs.evaluate import evaluate_run as evaluate
    from codistill.settings.augment import AugmentSettings
    from codistill.settings.config import ExecutionSettings, RunConfig, TeacherSettings, TrainSettings
    from codistill.sweeps.driver import sweep
    from codistill.training.record import record
    from codistill.training.resume import resume
    from codistill.training.teacher import load_teacher
    from codistill.training.train import train

__version__ = importlib.metadata.version("codistill")

# The module of each public name, imported when the name is first used: torch, which comes with it, takes seconds.
# Classes of methods are found by the registry, so that a new one needs no line here.
_HOMES = {
    "core.errors": "CodistillError",
    "data": "DATASETS Dataset Split dataset",
    "deploy.classifier": "Classifier load_classifier",
    "deploy.predict": "predict",
    "deploy.run": "Run",
    "methods": "METHODS Method MethodSettings ParameterGroup",
    "methods.cohort": "Outputs",
    "methods.kd": "WithTeacher",
    "methods.losses": "losses",
    "modules": "modules",
    "networks": "NETWORKS Network network network_from",
    "runs.evaluate": "evaluate",
    "settings.augment": "AugmentSettings",
    "settings.config": "ExecutionSettings RunConfig TeacherSettings TrainSettings",
    "sweeps.driver": "sweep",
    "training.record": "record",
    "training.resume": "resume",
    "training.teacher": "load_teacher",
    "training.train": "train",
}

__all__ = [
    "AB",
    "AHBF",
    "AT",
    "BYOT",
    "CD",
    "CLILR",
    "DATASETS",
    "DML",
    "FFL",
    "FFSD",
    "FSP",
    "KD",
    "KDCL",
    "KDGAN",
    "LMCL",
    "MCL",
    "METHODS",
    "MFEF",
    "NETWORKS",
    "OKDPH",
    "ONE",
    "PCL",
    "TAKD",
    "AugmentSettings",
    "Classifier",
    "CodistillError",
    "Dataset",
    "ExecutionSettings",
    "FitNets",
    "Independent",
    "Method",
    "MethodSettings",
    "Network",
    "OKDCheap",
    "OKDDip",
    "Outputs",
    "ParameterGroup",
    "Rocket",
    "Run",
    "RunConfig",
    "Split",
    "SwitOKD",
    "TeacherSettings",
    "TrainSettings",
    "WithTeacher",
    "__version__",
    "dataset",
    "evaluate",
    "load_classifier",
    "load_teacher",
    "losses",
    "modules",
    "network",
    "network_from",
    "predict",
    "record",
    "resume",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names.split()), "")
    found: Any
    if home:
        module = importlib.import_module(f"{__name__}.{home}")
        # `evaluate` scores a run; its module has a function of that name for a method, too.
        found = getattr(module, "evaluate_run" if name == "evaluate" else name, module)
    else:
        methods = importlib.import_module(f"{__name__}.methods").METHODS.values() if name[:1].isupper() else ()
        found = next((each for each in methods if each.__name__ == name), None)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, found)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
