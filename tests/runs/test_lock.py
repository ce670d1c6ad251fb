"""Who holds a run folder, and for how long."""

import subprocess
import sys
import textwrap

import pytest

import codistill as cd
from codistill.core.errors import UsageError
from codistill.runs.lock import lock_folder

from .. import tiny

HOLD = """
    import sys
    from pathlib import Path
    from codistill.runs.lock import lock_folder
    lock = lock_folder(Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds."""
    folder = tmp_path / "held"
    folder.mkdir()
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield folder, process
        process.stdin.close()


def test_a_folder_belongs_to_one_process_until_it_ends(held):
    folder, process = held
    data, settings = tiny.data(), tiny.settings(epochs=1)
    before = tiny.listing(folder)
    with pytest.raises(UsageError, match=rf"{folder} is in use by pid {process.pid} on host \S+: wait for it"):
        cd.train(tiny.method(), data, out=folder, settings=settings, show=False)
    assert tiny.listing(folder) == before
    process.kill()
    process.wait()
    cd.train(tiny.method(), data, out=folder, settings=settings, show=False)
    assert cd.Run(folder).summary["status"] == "finished"


def test_a_released_lock_can_be_had_again(tmp_path):
    lock_folder(tmp_path).close()
    lock = lock_folder(tmp_path)
    with pytest.raises(UsageError, match="is in use by pid"):
        lock_folder(tmp_path)
    lock.close()
