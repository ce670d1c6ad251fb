"""What torchrun tells the processes that it starts, read without torch."""

import os
import socket
from typing import Any

from codistill.core.errors import UsageError

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def world_size() -> int:
    """Return how many processes torchrun has started for this program; 1 without torchrun."""
    started = all(os.environ.get(name, "").isdecimal() for name in NUMBERS)
    return int(os.environ["WORLD_SIZE"]) if started else 1


def leads() -> bool:
    """Whether this process is the one of several that speaks."""
    return world_size() == 1 or os.environ["RANK"] == "0"


def launch() -> dict[str, Any]:
    """Return what config.json records: the number of ranks, and of several a name of the launch that restarts keep."""
    if world_size() == 1:
        return {"ranks": 1}
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return {"ranks": world_size(), "launch": name if name != "none" else f"{socket.gethostname()} {os.getppid()}"}


def refuse_ranks(what: str) -> None:
    """Refuse under torchrun what one process does.

    Raises:
        UsageError: torchrun has started several.
    """
    if world_size() > 1:
        raise UsageError(f"{what}: for one process only: start it without torchrun")
