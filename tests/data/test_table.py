import json

import numpy as np
import pytest

from codistill.core.errors import DataError, UsageError
from codistill.data import dataset
from codistill.data.images import open_image

from .writers import encode, write_folder

ROWS = [(f"photos/{name}{index}.png", name) for name in ("ant", "bee") for index in range(5)]


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    return write_folder(tmp_path, {path: encode(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)) for path, _ in ROWS})


def written(root, rows=ROWS, header="path,label", name="labels.csv", delimiter=","):
    text = "\n".join(delimiter.join(row) for row in [header.split(","), *rows])
    (root / name).write_text(text + "\n", encoding="utf-8")
    return root / name


def splits(rows=ROWS):
    return [(*row, ("train", "Train ", "valid", "test", "training")[index % 5]) for index, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("name", "delimiter", "header"),
    [
        ("labels.csv", ",", "path,label,split"),
        ("labels.CSV", ";", "File,Class,Subset"),
        ("labels.tsv", "\t", "image_path,category,set"),
    ],
)
def test_rows_are_images_classes_and_splits(root, name, delimiter, header):
    data = dataset("table", root=written(root, splits(), header, name, delimiter))
    assert data.class_names == ("ant", "bee") and data.image_size == (4, 6) and data.own
    expected = {"train": (0, 1, 4, 5, 6, 9), "validation": (2, 7), "test": (3, 8)}
    for part, split in data.splits.items():
        chosen = [ROWS[position] for position in expected[part]]
        assert split.files == tuple(path for path, _ in chosen)
        assert [data.class_names[label] for label in split.labels] == [name for _, name in chosen]
        for image, (path, _) in zip(split.images, chosen, strict=True):
            np.testing.assert_array_equal(image, open_image(root / path))


def test_lines_of_json(root):
    lines = [json.dumps({"file_name": path, "label": 3 if name == "ant" else 10, "box": [1]}) for path, name in ROWS]
    (root / "labels.jsonl").write_text("\n\n".join(lines) + "\n")
    data = dataset("table", root=root)  # the only table in the folder
    assert (
        data.class_names == ("3", "10") and data.drawn == "2 of 10 images, of each class its share, drawn with seed 0"
    )
    assert len(data.test) == 2 and set(data.test.files) | set(data.train.files) == {path for path, _ in ROWS}


def test_tables_as_programs_write_them(root):
    rows = [(f' "{path}"', f" {name} ") for path, name in ROWS]
    path = written(root, [*rows[:3], ("",), *rows[3:]])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert dataset("table:test=4", root=path).class_names == ("ant", "bee")


def test_paths_are_relative_to_a_folder_or_absolute_within_it(root):
    rows = [(str(root / path), name) if index % 2 else (f"./{path}", name) for index, (path, name) in enumerate(ROWS)]
    data = dataset("table", root=written(root, rows))
    assert {*data.train.files, *data.test.files} == {path for path, _ in ROWS}
    (root / "tables").mkdir()
    for images in ("..", root):
        data = dataset(f"table:images={images}", root=written(root / "tables"))
        assert {*data.train.files, *data.test.files} == {path for path, _ in ROWS}
    assert dataset("table:images=/", root=written(root / "tables", [(str(root / path), name) for path, name in ROWS]))


def test_paths_with_backslashes_as_windows_writes_them(root):
    rows = [(path.replace("/", "\\"), name) for path, name in ROWS]
    data = dataset("table", root=written(root, rows))
    assert {*data.train.files, *data.test.files} == {path for path, _ in ROWS}
    with pytest.raises(DataError, match=r"leads out of"):
        dataset("table", root=written(root, [("..\\ant.png", "ant"), *ROWS]))


def test_columns_by_name(root):
    path = written(root, [(*row, "x", "test") for row in splits()], "path,label,part,image,split")
    for options in ("path=path,split=part", "path=path,split=part,label=label"):
        assert len(dataset(f"table:{options}", root=path).validation) == 2
    assert dataset("table:path=path,split=none", root=path).drawn


@pytest.mark.fault(131)
@pytest.mark.parametrize(
    ("options", "header", "complaint"),
    [
        ("", "name,label", r"has no column of the path \(it has name, label\): name it with --data table:path=COLUMN"),
        ("", "photos/ant0.png,ant", "has no column of the path"),
        ("", "path,sort", "has no column of the label"),
        ("", "path,path", "its header has a column twice"),
        ("label=kind", "path,label", r"has no column 'kind' \(it has path, label\)"),
        ("split=part", "path,label", "has no column 'part'"),
        ("", "path,file", "path and file may both be the path: name the column with --data table:path=path"),
        ("images=nowhere", "path,label", "nowhere: no such folder: name that of the images"),
        ("test=99%", "path,label", "10 test images cannot be drawn of 10 images"),
        ("resize=-4", "path,label", "data set table: resize is -4"),
    ],
)
def test_columns_and_options_that_cannot_be(root, options, header, complaint):
    with pytest.raises((DataError, UsageError), match=complaint) as error:
        dataset(f"table:{options}", root=written(root, header=header))
    assert "\n" not in str(error.value)


@pytest.mark.fault(131)
def test_all_bad_rows_are_named_at_once_or_left_out(root, capsys):
    (root / "photos" / "cut.png").write_bytes(encode(np.zeros((4, 6, 3), np.uint8))[:40])
    outside = [
        ("../x.png", "ant"),
        ("/etc/passwd", "ant"),
        ("photos/../../x.png", "bee"),
        (".", "ant"),
        ("a/..", "ant"),
    ]
    bad = {
        "photos/missing.png": "missing.png: no such file",
        "photos/cut.png": "cut.png: cannot be read",
        ROWS[0][0]: "photos/ant0.png is in line 2, too: leave one of them",
        "notes.txt": "notes.txt is not an image file by its name",
    }
    rows = [(*row, "train") for row in ROWS[:8]] + [(*row, "test") for row in ROWS[8:]]
    rows += [(path, "ant", "train") for path in bad] + [(path, name, "train") for path, name in outside]
    rows += [("./" + ROWS[1][0], "bee", "train"), ("photos/new.png", "wasp", "test"), ("photos/y.png", "ant", "spare")]
    rows += [
        ("photos/ant9.png", "", "train"),
        ("", "ant", "train"),
        ("photos/z.png", "ant"),
        ("x.png", "a", "test", ""),
    ]
    path = written(root, rows, "path,label,split")
    with pytest.raises(DataError) as error:
        dataset("table", root=path)
    said = str(error.value)
    assert "\n" not in said and "16 files cannot be used: " in said and "--data table:skip_bad=true" in said
    expected = [*bad.values(), *(f"{place} leads out of {root}: name a folder" for place, _ in outside)]
    expected += ["too, where it is of class 'ant': leave one", "class 'wasp' has no training images"]
    expected += ["split 'spare' is unknown: write one of train, val, test", "labels.csv:24: has no label: fill it in"]
    expected += ["labels.csv:25: has no path", "labels.csv:26: split '' is unknown", "has 4 fields, but the header 3"]
    assert [each for each in expected if each not in said] == []
    data = dataset("table:skip_bad=true", root=path)
    assert (len(data.train), len(data.test), len(data.left_out)) == (8, 2, 16)
    assert "16 bad files are left out: labels.csv:" in capsys.readouterr().err


@pytest.mark.fault(131)
@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("x.csv", b"", "has no column of the path"),
        ("x.csv", b"path,label\n", r"x\.csv: has no training images"),
        ("x.csv", b"path,label\nphotos/ant0.png,ant\n", "all training images are of class 'ant'"),
        ("x.csv", b"path,label\ncaf\xe9.png,ant\n", r"x\.csv: cannot be read \('utf-8' codec .*: save it as UTF-8"),
        ("x.csv", b'path,label\n"photos/ant0.png,ant\n', r"x\.csv:\d: cannot be read"),
        ("x.csv", b"path,label\n" + b"a" * 200_000, r"x\.csv:2: cannot be read \(field larger"),
        ("x.csv", b"path,label\na\0.png,ant\n", r"x\.csv:2: a.*\.png is not an image file by its name"),
        ("x.jsonl", b'{"path": "photos/ant0.png", "label"', r"x\.jsonl:1: cannot be read"),
        ("x.jsonl", b'["photos/ant0.png", "ant"]\n', r"x\.jsonl:1: is no JSON object"),
        ("x.jsonl", b'{"path": ["photos/ant0.png"], "label": 1}', "has no column of the path"),
        ("x.jsonl", b"[" * 200_000, r"x\.jsonl:1: cannot be read"),
        ("x.xlsx", b"PK", r"x\.xlsx: is no table by its name: give a \.csv"),
    ],
)
def test_damaged_tables(root, name, content, complaint):
    (root / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint) as error:
        dataset("table", root=root / name)
    assert "\n" not in str(error.value)


@pytest.mark.fault(131)
def test_a_table_that_is_not_there_or_not_alone(root):
    with pytest.raises(DataError, match=r"labels\.csv: no such file: give a \.csv"):
        dataset("table", root=root / "labels.csv")
    written(root, name="a.csv")
    written(root, name="b.tsv", delimiter="\t")
    with pytest.raises(DataError, match="holds 2 tables: name the file itself"):
        dataset("table", root=root)
