"""What `import codistill` gives and does."""

import os
import subprocess
import sys

import pytest

import codistill as cd


def test_public_names_exist() -> None:
    assert all(hasattr(cd, name) for name in cd.__all__)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "passive 1000"),
        ({"OMP_WAIT_POLICY": "active"}, "active None"),
        ({"GOMP_SPINCOUNT": "20"}, "None 20"),
    ],
)
def test_threads_spin_for_a_short_time_unless_the_user_says_otherwise(given: dict[str, str], wanted: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    program = "import codistill, os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == wanted
