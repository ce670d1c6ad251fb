"""The net under a change of structure: `python -m tests.net` prints the results that such a change must not alter.

Hashes of all weights after two steps of every method, in float32 and in bf16, on one thread; every option of every
command with its default; the number of tests of each of the forty faults. Hashes depend on the machine: compare the
output before a change with that after it, on one machine.
"""

import contextlib
import hashlib
import io
import os
import re
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import codistill as cd
from codistill.cli import main as codistill

from .faults.table import tests_by_case

COMMANDS = ("resume", "evaluate", "predict", "export", "bench", "sweep", "list")
PAIR = ("--networks", "resnet20", "resnet20")
CASES: dict[str, tuple[str, ...]] = {
    **{
        name: PAIR
        for name in (
            "ahbf",
            "cl-ilr",
            "dml",
            "ffl",
            "independent",
            "kdcl",
            "l-mcl",
            "mcl",
            "mfef",
            "okdph",
            "one",
            "pcl",
        )
    },
    "okddip": (*PAIR, "resnet20"),
    "ffsd": (*PAIR, "resnet20"),
    "switokd": ("--networks", "resnet20", "resnet32"),
    "rocket": ("--networks", "resnet20", "resnet32"),
    "byot": ("--networks", "resnet20"),
    **{name: (*PAIR, "--teacher", "TEACHER") for name in ("kd", "fitnets", "at", "cd", "fsp", "ab")},
    "fitnets two stages": (*PAIR, "--teacher", "TEACHER", "--method.initial-share", "0.5"),
    "mfef taught": (*PAIR, "--teacher", "TEACHER"),
    "mfef unlike": ("--networks", "resnet20", "wrn-16-2", "mobilenetv2"),
    "ffl three": (*PAIR, "resnet20"),
    "kdcl one-view": (*PAIR, "--method.no-views-per-student"),
    "dml alternating": (*PAIR, "--method.update", "alternating"),
}


def weights(run: Path) -> str:
    digest = hashlib.sha256()
    for tensor in cd.Run(run).load_method().state_dict().values():  # in order: names may change
        digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def train(out: Path, method: str, *options: str) -> str:
    steps = ("--data", "digits", "--train-limit", "32", "-b", "16", "--epochs", "1", "--threads", "1")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = codistill(["train", method, *options, *steps, "--out", str(out)])
    return weights(out) if status == 0 else f"status {status}: {said.getvalue().strip()}"


def options(*command: str) -> list[str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        codistill([*command, "--help"])
    text = re.sub(r"[│╭╮╰╯─\s]+", " ", said.getvalue())
    found = re.findall(r"(--[a-z][a-z0-9.-]*)\b(?:(?!--[a-z]).)*?\(default: ([^)]*)\)", text)
    return [f"{' '.join(command)} {name} = {default}" for name, default in sorted(set(found))]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / "teacher"
        train(teacher, "independent", "--networks", "resnet20", "--seed", "7")
        for precision in ("float32", "bf16"):
            for number, (name, given) in enumerate(CASES.items()):
                given = tuple(str(teacher) if each == "TEACHER" else each for each in given)
                out = Path(folder) / f"{precision}{number}"
                print(name, precision, train(out, name.split()[0], *given, "--precision", precision), flush=True)
    for command in (*(("train", name) for name in cd.METHODS), *((name,) for name in COMMANDS)):
        print(*options(*command), sep="\n")
    for number, tests in tests_by_case().items():
        print(f"fault {number}: {len(tests)} tests")


if __name__ == "__main__":
    main()
