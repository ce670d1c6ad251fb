import pickle

import numpy as np
import pytest

from codistill.core.errors import DataError
from codistill.data import unpickle
from codistill.data.unpickle import read_pickle

from .writers import python2_pickle

DATA = np.arange(24, dtype=np.uint8).reshape(4, 6)


def read(content):
    return read_pickle(content, "batch", "fetch it")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_reads_what_numpy_writes(protocol, order):
    value = {"data": np.asarray(DATA, order=order), "labels": [1, 2], b"raw": b"\x00\xff", "wide": np.arange(3)}
    text = "twice"
    result = read(pickle.dumps(value | {text: [text, text]}, protocol=protocol))
    assert result["twice"] == ["twice", "twice"]
    np.testing.assert_array_equal(result["data"], DATA)
    np.testing.assert_array_equal(result["wide"], np.arange(3))
    assert result["data"].dtype == np.uint8 and result["labels"] == [1, 2] and result["raw"] == b"\x00\xff"


def test_reads_what_python_2_and_numpy_1_wrote():
    content = python2_pickle({b"data": DATA, b"labels": [3]})
    assert b"numpy.core.multiarray" in content
    result = read(content)
    np.testing.assert_array_equal(result["data"], DATA)
    assert result["labels"] == [3]


# tests/faults/test_data.py has programs that would run code.
@pytest.mark.parametrize("name", ["builtins.eval", "numpy.load", "numpy.core.multiarray.scalar", "codecs.encode"])
def test_forbidden_globals_are_named(name):
    module, attribute = name.rsplit(".", 1)
    with pytest.raises(DataError, match=f"^batch: forbidden global {name}: fetch it$"):
        read(f"c{module}\n{attribute}\n(S'x'\ntR.".encode())


def test_arrays_of_objects_and_other_codecs_are_refused():
    with pytest.raises(DataError, match=r"type '\|O8'"):
        read(pickle.dumps({"data": np.array([None])}, protocol=2))
    with pytest.raises(DataError, match="type '<f4'"):
        read(pickle.dumps({"data": np.zeros(3, np.float32)}, protocol=2))
    with pytest.raises(DataError, match="forbidden encoding 'zlib'"):
        read(b"c_codecs\nencode\n(Vx\nVzlib\ntR.")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"(ios\nsystem\n.", "forbidden instruction INST"),
        (b"P1\n.", "forbidden instruction PERSID"),
        (b"\x80\x05\x96" + (1 << 33).to_bytes(8, "little") + b".", "cannot be read"),
        (b"\x80\x02Nr" + (1 << 30).to_bytes(4, "little") + b".", "impossible memo index 1073741824"),
        (b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b".", "cannot be read"),
    ],
)
def test_other_instructions_and_lengths_that_ask_for_memory_are_refused(content, complaint):
    with pytest.raises(DataError, match=complaint):
        read(content)


@pytest.mark.parametrize("name", [b"c_codecs\nencode\n", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n"])
@pytest.mark.parametrize("state", [b"}U\x07__doc__K\x01s", b"N}U\x0b__module__K\x01s\x86"])
def test_no_state_outlives_a_pickle(name, state):
    before = [dict(vars(each)) for each in unpickle._STAND_INS.values()]
    with pytest.raises(DataError):
        read(b"\x80\x02" + name + state + b"b.")
    assert [dict(vars(each)) for each in unpickle._STAND_INS.values()] == before


def test_programs_without_end_are_refused(monkeypatch):
    monkeypatch.setattr(unpickle, "_MOST_INSTRUCTIONS", 100)
    with pytest.raises(DataError, match="has more than 100 instructions"):
        read(b"\x80\x02(" + b"]" * 200 + b"l.")


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps([1, 2]), pickle.dumps({"a": 1})[:-1]])
def test_damage(content):
    with pytest.raises(DataError, match=r"^batch: .*: fetch it$"):
        read(content)
