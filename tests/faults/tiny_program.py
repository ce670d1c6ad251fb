"""`codistill` with a network named `tiny` and without pages: `python -m tests.faults.tiny_program`.

`KILL` in the environment names a run whose process is killed after its first checkpoint, once; `KILL_DRIVER` one whose
process kills the one that started it, too.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from codistill.cli import main
from codistill.runs.checkpoint import CheckpointStore
from codistill.training import trainer as loop

from .. import tiny

save = CheckpointStore.save


def killing(store: CheckpointStore, *arguments: Any, **named: Any) -> None:
    save(store, *arguments, **named)
    run = store.folder.parent
    victims = [os.environ.get(name) for name in ("KILL", "KILL_DRIVER")]
    mark = Path(f"{run}.killed")
    if run.name in victims and not mark.exists():
        mark.touch()
        if run.name == victims[1]:
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


CheckpointStore.save = killing  # type: ignore[method-assign]
loop.write_report = lambda run, summary: None
with tiny.registered():
    sys.exit(main())
