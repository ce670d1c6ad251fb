"""Read the pickles of the CIFAR python archives without running code that they name.

A pickle is a small program that names the callables which rebuild its objects. Only the instructions that plain data
needs are accepted here, and five names, those of NumPy arrays and bytes. Each of them stands for a class written below,
so that no code outside this file is called with arguments from the file.
"""

import io
import pickle
import pickletools
from typing import Any

import numpy as np
import numpy.typing as npt

from codistill.core.errors import DataError
from codistill.data.untrusted import reading

# Integer types only: pixels and labels.
_DTYPES = {"u1", "i1", "i2", "i4", "i8"}


class _Type:
    """Stand-in for numpy.dtype."""

    def __init__(self, code: Any, *_flags: Any) -> None:
        self.code = _text(code)
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        self.order = _text(state[1])

    def dtype(self) -> np.dtype[Any]:
        if self.code not in _DTYPES or self.order not in ("<", ">", "|", "="):
            raise DataError(f"an array of type {self.order + self.code!r}; only integers belong there")
        return np.dtype(self.order + self.code)


class _Array:
    """Stand-in for numpy.ndarray, and for the function that makes one; `array` is the result."""

    array: npt.NDArray[Any]

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _version, shape, kind, is_fortran, content = state
        content = content.encode("latin1") if isinstance(content, str) else content
        flat = np.frombuffer(content, dtype=kind.dtype())
        self.array = flat.reshape(shape, order="F" if is_fortran else "C")


class _Bytes:
    """Stand-in for _codecs.encode; the result is plain bytes."""

    def __new__(cls, text: str, encoding: str) -> bytes:  # type: ignore[misc]
        if encoding not in ("latin1", "latin-1"):
            raise DataError(f"forbidden encoding {encoding!r}")
        return text.encode("latin1")

    def __setstate__(self, state: Any) -> None:
        raise TypeError("text has no state")


# All have __setstate__: without it, BUILD could set attributes of the stand-in itself, for every pickle to come.
_STAND_INS: dict[tuple[str, str], type] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): _Array,  # NumPy 1
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # NumPy 2
    ("_codecs", "encode"): _Bytes,  # bytes, written by Python 3 in protocol 2
}

_INSTRUCTIONS = frozenset(
    """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS
    PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD
    """.split()  # noqa: SIM905 - fifty lines else
)
# Values that may be used again from the memo. No tuples: one that holds a tuple twice, which holds a tuple twice, and
# so on, is a short program, but hashing it, as a key of a dictionary, would take for ever.
_SHARED = frozenset(
    """
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
    EMPTY_LIST LIST EMPTY_DICT DICT GLOBAL STACK_GLOBAL REDUCE
    """.split()  # noqa: SIM905 - fifteen lines else
)
_MOST_INSTRUCTIONS = 4_000_000  # CIFAR-100 needs 400,000: two labels and a file name for each image


def _check_instructions(content: bytes) -> None:
    """Check the program before it runs: a few bytes could ask for any amount of memory or time."""
    memo: dict[Any, bool] = {}  # index -> may be used again
    before = ""
    for count, (instruction, argument, _) in enumerate(pickletools.genops(content)):
        name = instruction.name
        if name not in _INSTRUCTIONS:
            raise DataError(f"forbidden instruction {name}")
        if count == _MOST_INSTRUCTIONS:
            raise DataError(f"has more than {count} instructions")
        if name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            index = len(memo) if argument is None else int(argument)
            if not 0 <= index <= count:
                raise DataError(f"impossible memo index {index}")
            memo[index] = before in _SHARED
        elif name in ("GET", "BINGET", "LONG_BINGET") and not memo.get(argument, False):
            raise DataError(f"forbidden use of memo {argument}")
        before = name


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise DataError(f"forbidden global {module}.{name}")
        return _STAND_INS[module, name]


def read_pickle(content: bytes, where: str, fix: str) -> dict[str, Any]:
    """Return a pickled dictionary of integer arrays, lists, texts and numbers.

    Keys become texts, arrays NumPy arrays; texts that Python 2 wrote are bytes. All else is a DataError.
    """
    with reading(where, fix):
        try:
            _check_instructions(content)
            value = _RestrictedUnpickler(io.BytesIO(content), encoding="bytes").load()
        except DataError as error:
            raise DataError(f"{where}: {error}: {fix}") from error
        if not isinstance(value, dict):
            raise DataError(f"{where}: holds a {type(value).__name__}, not a dictionary: {fix}")
        return {_text(key): item.array if isinstance(item, _Array) else item for key, item in value.items()}


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
