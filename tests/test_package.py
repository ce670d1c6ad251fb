"""The public surface: what `import codistill` and a wrong command line load, and what they leave alone."""

import os
import re
import subprocess
import sys

import pytest

import codistill as cd
from codistill.core.registry import registered_names
from codistill.methods import METHODS

HEAVY = "{'torch', 'numpy', 'matplotlib', 'jinja2', 'rich', 'tensorboard', 'tyro'} & sys.modules.keys()"


def loaded(
    program: str, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


def test_public_names_exist() -> None:
    assert all(getattr(cd, name) is not None for name in cd.__all__)
    assert set(cd.__all__) <= set(dir(cd))
    assert not hasattr(cd, "Nothing") and not hasattr(cd, "nothing")
    assert (cd.train.__name__, cd.resume.__name__, cd.sweep.__name__) == ("train", "resume", "sweep")


def test_every_method_is_a_public_name() -> None:
    own = [METHODS[name] for name in registered_names("codistill.methods")]
    assert all(getattr(cd, each.__name__) is each for each in own)
    assert {each.__name__ for each in own} <= {*cd.__all__}  # which type checkers know


@pytest.mark.parametrize("name", ["__version__", "__all__"])
def test_importing_loads_nothing_heavy(name: str) -> None:
    assert loaded(f"import sys, codistill; codistill.{name}; print({HEAVY})").stdout == "set()\n"


def test_a_name_loads_nothing_of_the_reports_and_the_command_line() -> None:
    program = "import sys, codistill; codistill.MFEF, codistill.dataset; print({'tyro', 'matplotlib', 'jinja2'} & "
    assert loaded(f"{program} sys.modules.keys())").stdout == "set()\n"


WRONG = {
    "--help": "usage: codistill COMMAND",
    "--version": "codistill 0",
    "trian": "unknown command 'trian': did you mean train?",
    "train mfef --epcohs 3": "codistill train mfef: unknown option --epcohs: did you mean --epochs?",
    "train --method.temprature=3": "unknown option --method.temprature=3: did you mean --method.temperature?",
    "train mfeff": "unknown method 'mfeff': did you mean mfef?",
    "train --networks resnet20 resnet2O:shortcut=A": "unknown network 'resnet2O': did you mean ",
    "train --networks timm/resnet18 tim/resnet18": "unknown network 'tim/resnet18'",
    "train --data=digts": "unknown data set 'digts': did you mean digits?",
    "train --optimiser adam": "codistill train mfef: --optimiser does not exist: choose it with --optimizer: sgd or",
    "train --kernels fused": "--kernels was removed: leave it out; --compile on|off",
    "train --overlap on": "--overlap was removed: leave it out",
    "train --processes 2": "--processes was removed: .* torchrun --nproc-per-node N -m codistill train",
    "train --max-restarts=2": "--max-restarts was removed: .* torchrun .*--max-restarts",
    "bench ffl --seconds 3 --rnus 2": "codistill bench ffl: unknown option --rnus: did you mean --runs?",
    "evaluate run --jsn": "codistill evaluate: unknown option --jsn: did you mean --json?",
}


@pytest.mark.parametrize("command", WRONG)
def test_what_is_wrong_with_a_command_line_is_said_before_torch_is_loaded(command: str) -> None:
    program = f"import sys; from codistill.cli import main; status = main(sys.argv[1:]); print(status, {HEAVY})"
    done = loaded(program, *command.split())
    right = command.startswith("--")
    assert done.stdout.endswith(f"{0 if right else 2} set()\n")
    said = done.stdout if right else done.stderr
    assert re.search(WRONG[command], said), said
    assert right or said.count("\n") == 1


GIVEN = [({}, "passive 1000"), ({"OMP_WAIT_POLICY": "active"}, "active None"), ({"GOMP_SPINCOUNT": "20"}, "None 20")]


@pytest.mark.parametrize(("given", "wanted"), GIVEN)
def test_threads_spin_for_a_short_time_unless_the_user_says_otherwise(given: dict[str, str], wanted: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    program = "import codistill, os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    assert loaded(program, environment=environment | given).stdout.strip() == wanted


@pytest.mark.slow  # it imports torch
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_run_does_not_wait_for_the_compiler_to_be_imported(tmp_path, precision):
    command = (
        f"train mfef --networks resnet20 resnet20 --data digits --train-limit 16 -b 16 --epochs 1 --out {tmp_path}/run"
    )
    program = "import sys; from codistill.cli import main; main(sys.argv[1:]); print('torch._dynamo' in sys.modules)"
    done = loaded(program, *command.split(), "--precision", precision)
    assert done.stdout.endswith("False\n")


@pytest.mark.slow  # it imports torch
def test_listing_networks_does_not_import_those_of_others():
    program = "import sys; from codistill.cli import main; main(['list']); print({'timm', 'torchvision'} & "
    done = loaded(f"{program} sys.modules.keys())")
    assert done.stdout.endswith("set()\n") and "timm/*" in done.stdout
