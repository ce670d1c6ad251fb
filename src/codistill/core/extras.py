"""Packages that are not there, and how to install them into this environment."""

import importlib.metadata
import importlib.util
import re
import shlex
import sys

from codistill.core.errors import UsageError

# Where a package is not called as its module is.
NAMES = {"PIL": "pillow", "sklearn": "scikit-learn"}


def missing_package(error: BaseException) -> str:
    """Return the line about a package that an import has missed, and how to install it here; empty: another error."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not name or name == "codistill":
        return ""
    return lacks(name)


def lacks(module: str) -> str:
    """Return the line about a package that is not installed here."""
    return f"the package {NAMES.get(module, module)} is not installed here: {install(module)}"


def refuse_missing(where: str, package: str) -> None:
    """Raise `UsageError` where a package is not installed here; it is not imported. `where` begins the line."""
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{where}: {lacks(package)}")


def install(*modules: str) -> str:
    """Return the command that installs packages into this environment, in the versions that codistill needs.

    codistill itself is in no index of packages: its extras cannot be named to pip.
    """
    try:
        declared = importlib.metadata.requires("codistill") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder of sources
        declared = []
    needed = {re.split(r"[^\w.-]", each)[0].lower(): each.partition(";")[0].replace(" ", "") for each in declared}
    wanted = (needed.get(name.lower(), name) for name in (NAMES.get(each, each) for each in modules))
    return shlex.join([sys.executable or "python", "-m", "pip", "install", *wanted])
