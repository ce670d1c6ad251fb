"""The command line `codistill`: its help, dispatch and errors."""

import errno
import importlib
import importlib.metadata
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

from codistill.cli.early import refuse_early
from codistill.cli.options import OPTIONS
from codistill.core.errors import CodistillError, UsageError
from codistill.core.extras import missing_package
from codistill.core.files import system_error
from codistill.core.imports import import_own, own_place, split_imports
from codistill.core.registry import unknown_name
from codistill.core.signals import Terminated, terminate
from codistill.core.torchrun import refuse_ranks, world_size

STOPPED = ("interrupted", "terminated")
USAGE = """\
usage: codistill COMMAND ...

  train [METHOD] --networks A B .. --data NAME   train students together, in a new run folder
  resume RUN                                     resume an interrupted run
  sweep SPEC.toml --out DIR                      train many runs in processes of their own; resumes if interrupted
  reproduce TABLE                                the paper's table: train what it lacks, print ours beside it
  evaluate RUN                                   score every predictor of a run on its test set
  report RUN ..                                  write the page of a run again, or one that compares runs
  predict FILE_OR_RUN IMAGE ..                   classify images
  export RUN --predictor student0 --format onnx  write one predictor as a file or a folder, and check it
  bench [METHOD] --networks A B .. [--compare]   time training steps here, also against a plain PyTorch loop
  list                                           list methods, networks and data sets

codistill COMMAND --help shows a command's options. With any command, --import MODULE or --import FILE.py registers
methods, networks and data sets of your own (more than once for several), and --debug shows tracebacks."""


def run_command(arguments: Sequence[str]) -> None:
    """Run a command line."""
    own, arguments = split_imports(arguments)
    for name in own:
        import_own(name)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
    elif arguments[0] == "--version":
        print(f"codistill {importlib.metadata.version('codistill')}")
    elif arguments[0] in OPTIONS:
        command, *rest = arguments
        if command not in ("train", "resume"):
            refuse_ranks(f"codistill {command}")
        if not own:
            refuse_early(command, rest)
        # Only now, for torch comes with them.
        commands = importlib.import_module("codistill.cli.commands")
        getattr(commands, f"{command}_command")(rest)
    else:
        raise UsageError(unknown_name("command", arguments[0], OPTIONS))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status; an error is one line on stderr.

    Args:
        arguments: Without the program's name; None: those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [each for each in given if each != "--debug"]
    if threading.current_thread() is threading.main_thread():  # which alone may set handlers
        signal.signal(signal.SIGTERM, terminate)
    for stream in (sys.stdout, sys.stderr):
        # Letters that the encoding lacks are shown as \u732b. A notebook has streams of its own, a service none.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        run_command(given)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        if type(error) is SystemExit:  # --help of a command
            return int(error.code or 0)
        if debug:
            traceback.print_exc()
        status, line = explain(error)
        if line in STOPPED and next((each for each in given if each in OPTIONS), None) in ("train", "resume"):
            line += "; where a run folder is there already, codistill resume RUN resumes it"
        if isinstance(error, OSError) and sys.stdout is not None:
            try:
                sys.stdout.flush()
            except OSError:  # or Python writes to it again when it exits, and says so
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # A wrong command line is wrong in every process that torchrun started: the first of a machine says so.
        if status != 2 or world_size() == 1 or os.environ["LOCAL_RANK"] == "0":
            print(f"codistill: error: {line}", file=sys.stderr)
        return status


def explain(error: BaseException) -> tuple[int, str]:
    """Return the exit status of an error, and its line."""
    line = " ".join(str(error).split())
    match error:
        case CodistillError():
            return error.exit_status, line
        case KeyboardInterrupt():
            return 130, line or STOPPED[0]
        case Terminated():
            return 143, line
        # That of torch, which need not be loaded, by its name.
        case _ if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return 6, f"out of memory: use a smaller --batch-size or fewer or smaller --networks ({line[:200]})"
        case ModuleNotFoundError() if missing := missing_package(error):
            return 2, missing
        case OSError() if error.errno not in (None, errno.EBADF, errno.EFAULT):
            return explain(system_error(error))
        case _ if where := own_place(error):
            return 2, f"{type(error).__name__} at {where}: {line[:300]}: fix it there; --debug shows how it was reached"
        case _:
            return 1, f"bug: {type(error).__name__}: {line}: please report it with the output of --debug"
