import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    result = read(pickle.dumps(value, protocol=protocol))
    np.testing.assert_array_equal(result["data"], DATA)
    np.testing.assert_array_equal(result["wide"], np.arange(3))
    assert result["data"].dtype == np.uint8 and result["labels"] == [1, 2] and result["raw"] == b"\x00\xff"


def test_reads_what_python_2_and_numpy_1_wrote():
    content = python2_pickle({b"data": DATA, b"labels": [3]})
    assert b"numpy.core.multiarray" in content
    result = read(content)
    np.testing.assert_array_equal(result["data"], DATA)
    assert result["labels"] == [3]


@pytest.mark.parametrize(
    "name",
    ["os.system", "posix.system", "builtins.eval", "numpy.load", "numpy.core.multiarray.scalar", "codecs.encode"],
)
@pytest.mark.parametrize("protocol", [0, 4])
def test_forbidden_globals_are_named_and_never_called(tmp_path, name, protocol):
    sentinel = tmp_path / "sentinel"
    module, attribute = name.rsplit(".", 1)
    command = f"touch {sentinel}".encode()
    if protocol == 0:
        content = f"c{module}\n{attribute}\n(S'{command.decode()}'\ntR.".encode()
    else:
        texts = [bytes([0x8C, len(text)]) + text for text in (module.encode(), attribute.encode(), command)]
        content = b"\x80\x04" + texts[0] + texts[1] + b"\x93" + texts[2] + b"\x85R."
    with pytest.raises(DataError, match=f"^batch: forbidden global {name}: fetch it$"):
        read(content)
    assert not sentinel.exists()


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


def test_a_tuple_cannot_be_used_twice():
    doubled = b"".join(b"h%ch%c\x86q%c" % (index, index, index + 1) for index in range(60))
    with pytest.raises(DataError, match="forbidden use of memo 0"):
        read(b"\x80\x02})q\x00" + doubled + b"Ns.")
    text = "labels"
    assert read(pickle.dumps({text: [text, text]})) == {text: [text, text]}


def test_programs_without_end_are_refused(monkeypatch):
    monkeypatch.setattr(unpickle, "_MOST_INSTRUCTIONS", 100)
    with pytest.raises(DataError, match="has more than 100 instructions"):
        read(b"\x80\x02(" + b"]" * 200 + b"l.")


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps([1, 2]), pickle.dumps({"a": 1})[:-1]])
def test_damage(content):
    with pytest.raises(DataError, match=r"^batch: .*: fetch it$"):
        read(content)


GOOD = python2_pickle({b"data": DATA, b"labels": [3, 4]})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_damage_gives_a_result_or_our_error(changes):
    content = bytearray(GOOD)
    for place, value in changes:
        content[place] = value
    try:
        read(bytes(content))
    except DataError as error:
        assert "\n" not in str(error)
