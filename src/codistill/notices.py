"""What a person is told beside a command's output, a line each, on standard error."""

import functools
import sys


def warn(line: str) -> None:
    """Print a warning of one line."""
    print(f"codistill: warning: {line}", file=sys.stderr)


@functools.cache
def warn_once(line: str) -> None:
    """Print a warning of one line, the first time that it comes up."""
    warn(line)


def note(line: str) -> None:
    """Print what takes a while, and why, in one line."""
    print(f"codistill: {line}", file=sys.stderr)
