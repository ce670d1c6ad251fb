"""Which code this is: a digest of the package's files, and the commit where they are a git checkout."""

import contextlib
import functools
import hashlib
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@functools.cache
def source() -> dict[str, str]:
    """Return `source_sha256` of the package's Python files and, where git tracks them, `commit`.

    The commit ends with `-dirty` where files of the checkout differ from it.
    """
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(f"{path.relative_to(PACKAGE).as_posix()}\n".encode() + path.read_bytes())
    about = {"source_sha256": found.hexdigest()}
    # An installed package may lie in a checkout of something else, which does not track it.
    git = ["git", "-C", str(PACKAGE)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        _output([*git, "ls-files", "--error-unmatch", "__init__.py"])
        about["commit"] = _output([*git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"])
    return about


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
