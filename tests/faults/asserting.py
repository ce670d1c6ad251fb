"""How each fault must look from outside: one line, one exit status, and nothing changed on the disk."""

import signal
from pathlib import Path

import pytest

from codistill.cli import main

from .. import tiny


def refused(
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    *fragments: str,
    unchanged: Path | None = None,
    warnings: int = 0,
) -> str:
    """Run a command line that must be refused.

    Args:
        capsys: The fixture.
        arguments: The command line without the program's name.
        status: The exit status expected.
        fragments: Text that the error line must hold, literally.
        unchanged: A folder that must be, with all its contents, as it was before.
        warnings: Lines of warning expected before the error.

    Returns:
        The line of the error, without its line break.
    """
    before = None if unchanged is None else tiny.listing(unchanged)
    capsys.readouterr()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        got = main(arguments)
    finally:
        signal.signal(signal.SIGTERM, handler)
    error = capsys.readouterr().err
    assert got == status, error
    assert error.endswith("\n"), error
    *before_it, line = error.removesuffix("\n").split("\n")
    assert line.startswith("codistill: error: ") and len(before_it) == warnings, error
    assert all(each.startswith("codistill: warning: ") for each in before_it), error
    for fragment in fragments:
        assert fragment in line, f"{fragment!r} is not in {line!r}"
    if unchanged is not None:
        assert tiny.listing(unchanged) == before
    return line
