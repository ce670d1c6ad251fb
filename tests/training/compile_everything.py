"""Compile all kinds of networks and all methods without leaving anything to Python; print what could be compiled.

They train in bf16, with weights that are cast again in each step, which must not cause another compilation.
"""

import torch

from codistill.methods import METHODS, Method
from codistill.networks import NETWORKS
from codistill.training import compiling
from codistill.training.forward import TrainingForward

from .. import tiny

# One of each kind of block; the others differ in depth and width.
KINDS = ("resnet20", "wrn-16-2", "densenet-40-12", "mobilenetv2", "vgg8")


def train(method: Method, size: int) -> None:
    views = (method.views,) if method.views > 1 else ()
    forward, labels = TrainingForward(method, "bf16"), torch.arange(4) % 3
    with compiling.compiled(method, fullgraph=True):
        for again in (False, True):
            with torch._dynamo.config.patch(error_on_recompile=again):
                outputs = forward(torch.randn(*views, 4, 3, size, size))
                sum(method.losses(outputs, labels, torch.tensor(0.5)).values()).backward()


def main() -> None:
    torch.manual_seed(0)
    compiling.BACKEND = "eager"
    for name in KINDS:
        method = METHODS["independent"]([NETWORKS[name](num_classes=3)], 3).train()
        train(method, 16)
        print(name, flush=True)
    for name, kind in METHODS.items():
        students = max(kind.min_students, min(2, kind.max_students or 2))
        method = tiny.method(kind, students=students).train()
        train(method, 8)
        print(name, flush=True)


if __name__ == "__main__":
    main()
