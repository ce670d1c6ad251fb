"""benchmarks/launches.py counts what a step launches."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_fused_kernels_stand_for_more_operators_than_they_are():
    script = Path(__file__).parents[1] / "benchmarks" / "launches.py"
    command = [sys.executable, str(script), "--method", "independent", "--networks", "resnet20", "--side", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    stock, fused = found["stock"], found["fused"]
    # 19 convolutions in blocks and the stem, 2 on shortcuts: each normalisation is 2 kernels in each direction.
    assert stock["own_kernels"] == 0 and fused["own_kernels"] >= 4 * 21
    assert fused["operators"] + fused["own_kernels"] < stock["operators"]
    assert found["environment"]["torch"]
