"""Stores: image files that are decoded once into a file, which is checked, resumed and never trained on half-made."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codistill.core.errors import ResourceError, UsageError
from codistill.data import Split, duplicates, store
from codistill.data.images import decode_image
from codistill.data.mapped import RowReader, digest, facts_of, histogram, is_mapped
from codistill.data.store import decoded, stored_in

NAMES = [f"{index:02}.png" for index in range(12)]
SIZE = (4, 5)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    root.mkdir()
    random = np.random.default_rng(0)
    for name in NAMES:
        Image.fromarray(random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(root / name)
    return root


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(store, "BATCH", 2 * SIZE[0] * SIZE[1] * 3)


def in_store(photos: Path, names: list[str] = NAMES, **options: object) -> store.Decoded:
    with stored_in(str(photos.parent / "cache")):
        return decoded(photos, names, SIZE, **({"resize": False} | options))


def folder(photos: Path) -> Path:
    (path,) = (photos.parent / "cache" / "images").iterdir()
    return path


def plain(photos: Path, names: list[str] = NAMES) -> np.ndarray:
    return np.stack([np.asarray(Image.open(photos / name)) for name in names])


def test_a_store_holds_what_memory_would(photos, capsys):
    with stored_in("off"):
        memory = decoded(photos, NAMES, SIZE, resize=False)
    found = in_store(photos)
    assert not isinstance(memory.images, np.memmap) and is_mapped(found.images)
    for each in (memory, found):
        assert np.array_equal(each.images, plain(photos)) and each.kept.tolist() == list(range(12))
    facts = facts_of(found.images)
    assert facts.sha256 == digest(memory.images)
    assert np.array_equal(facts.histogram, histogram(memory.images))
    assert facts_of(found.images[:3]) is None  # they are of the whole
    first, last = capsys.readouterr().err.splitlines()
    assert "decoding 12 images" in first and "12 images decoded and checked" in last


def test_a_second_start_decodes_nothing(photos, monkeypatch, capsys):
    in_store(photos)
    capsys.readouterr()
    monkeypatch.setattr(store, "decode_image", None)
    assert np.array_equal(in_store(photos).images, plain(photos))
    assert capsys.readouterr().err == ""


def test_few_small_images_are_no_file_unless_a_place_is_named(photos, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(photos.parent / "user"))
    assert not isinstance(decoded(photos, NAMES, SIZE, resize=False).images, np.memmap)
    assert not (photos.parent / "user").exists()
    monkeypatch.setattr(store, "FEWEST_FILES", 12)
    assert is_mapped(decoded(photos, NAMES, SIZE, resize=False).images)
    assert (photos.parent / "user" / "codistill" / "images").is_dir()


@pytest.mark.parametrize("change", ["contents", "time", "names", "interpolation", "size"])
def test_what_changes_pixels_makes_another_store(photos, change):
    before = in_store(photos, resize=True, interpolation="bilinear").images
    names, options = NAMES, {"resize": True, "interpolation": "bilinear"}
    if change == "contents":
        Image.new("RGB", SIZE[::-1]).save(photos / NAMES[3])
    if change == "time":
        os.utime(photos / NAMES[3], (1, 1))
    if change == "names":
        names = NAMES[1:]
    if change == "interpolation":
        options["interpolation"] = "bicubic"
    if change == "size":
        with stored_in(str(photos.parent / "cache")):
            assert decoded(photos, NAMES, (2, 3), resize=True).images.shape == (12, 2, 3, 3)
    else:
        assert len(in_store(photos, names, **options).images) == len(names)
    assert len(list((photos.parent / "cache" / "images").iterdir())) == 2
    assert len(before) == 12


def test_files_that_cannot_be_used_are_left_out_with_a_line(photos):
    (photos / NAMES[0]).write_bytes(b"no image")
    Image.new("RGB", (7, 7)).save(photos / NAMES[5])
    for _ in range(2):  # made, and found
        found = in_store(photos, [*NAMES, "gone.png"])
        assert list(found.bad) == [0, 12] and "gone.png: no such file" in found.bad[12]
        assert list(found.unlike) == [5] and "05.png: is 7x7 pixels, not 4x5" in found.unlike[5]
        assert found.kept.tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
        assert np.array_equal(found.images, plain(photos, [NAMES[position] for position in found.kept]))
        assert facts_of(found.images).sha256 == digest(np.array(found.images))


def test_a_set_without_any_usable_file(photos):
    for name in NAMES:
        (photos / name).write_bytes(b"")
    for _ in range(2):
        found = in_store(photos)
        assert found.images.shape == (0, *SIZE, 3) and len(found.bad) == 12


def test_contents_that_are_no_files(photos):
    contents = [(photos / name).read_bytes() for name in NAMES]
    read = {"read": contents.__getitem__, "version": "1"}
    assert np.array_equal(in_store(photos, list("abcdefghijkl"), **read).images, plain(photos))
    contents.reverse()
    read["version"] = "2"
    assert np.array_equal(in_store(photos, list("abcdefghijkl"), **read).images, plain(photos)[::-1])


def stop_after(monkeypatch, batches: int) -> None:
    """Have the process stop, as by Ctrl-C, when it has written so many batches."""
    whole = store._Files.batches

    def stopping(files, positions):
        for count, batch in enumerate(whole(files, positions)):
            if count == batches:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(store._Files, "batches", stopping)


def count_decoded(monkeypatch) -> list[str]:
    names: list[str] = []

    def counting(content, where, *given, **more):
        names.append(Path(where).name)
        return decode_image(content, where, *given, **more)

    monkeypatch.setattr(store, "decode_image", counting)
    return names


@pytest.mark.fault(150)
def test_a_store_goes_on_where_it_was_left(photos, capsys):
    (photos / NAMES[1]).write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            in_store(photos)
    assert {each.name for each in folder(photos).iterdir()} == {"lock", "pixels.part", "rows"}
    with pytest.MonkeyPatch.context() as patch:
        names = count_decoded(patch)
        found = in_store(photos)
    assert sorted(names) == [NAMES[1], *NAMES[6:]]
    assert "5 are there already" in capsys.readouterr().err
    assert list(found.bad) == [1] and np.array_equal(found.images, plain(photos, [NAMES[0], *NAMES[2:]]))
    assert {each.name for each in folder(photos).iterdir()} == {"lock", "pixels", "rows", "about.json"}


@pytest.mark.fault(150)
@pytest.mark.parametrize("harm", ["cut pixels", "cut rows", "flip", "order", "no pixels", "renamed"])
def test_what_a_kill_or_a_bad_disk_left_is_checked_before_it_is_used(photos, harm):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            in_store(photos)
    part, rows = folder(photos) / "pixels.part", folder(photos) / "rows"
    if harm == "cut pixels":
        os.truncate(part, 150)
    if harm == "cut rows":
        os.truncate(rows, 31)
    if harm == "flip":
        content = bytearray(part.read_bytes())
        content[130] ^= 1
        part.write_bytes(content)
    if harm == "order":
        rows.write_bytes(rows.read_bytes()[::-1])
    if harm == "no pixels":
        part.unlink()
    if harm == "renamed":
        part.rename(folder(photos) / "pixels")
    assert np.array_equal(in_store(photos).images, plain(photos))


@pytest.mark.fault(150)
@pytest.mark.parametrize("harm", ["cut", "flip", "rows", "json", "other", "no pixels", "part"])
def test_a_damaged_store_is_made_again(photos, harm, capsys):
    in_store(photos)
    about, pixels = folder(photos) / "about.json", folder(photos) / "pixels"
    if harm == "cut":
        os.truncate(pixels, 700)
    if harm == "flip":
        pixels.write_bytes(bytes(len(NAMES) * 60))
    if harm == "rows":
        os.truncate(folder(photos) / "rows", 36)
    if harm == "json":
        about.write_text(about.read_text()[:50])
    if harm == "other":
        about.write_text(json.dumps(json.loads(about.read_text()) | {"key": "0"}))
    if harm == "no pixels":
        pixels.unlink()
    if harm == "part":
        pixels.rename(folder(photos) / "pixels.part")
    capsys.readouterr()
    assert np.array_equal(in_store(photos).images, plain(photos))
    assert "damaged" in capsys.readouterr().err.splitlines()[0]
    assert np.array_equal(in_store(photos).images, plain(photos))
    assert capsys.readouterr().err == ""


@pytest.mark.fault(150)
def test_a_disk_that_loses_what_was_written_is_no_store(photos, monkeypatch):
    monkeypatch.setattr(store.os, "fsync", lambda _: os.truncate(folder(photos) / "pixels.part", 0) or _harm(photos))
    with pytest.raises(ResourceError, match="does not hold what was written to it: repair or replace the disk"):
        in_store(photos)
    assert not (folder(photos) / "about.json").exists()


def _harm(photos: Path) -> None:
    (folder(photos) / "pixels.part").write_bytes(bytes(len(NAMES) * 60))


@pytest.mark.fault(151)
def test_a_full_disk_is_one_line_and_what_was_written_is_kept(photos, monkeypatch):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(ResourceError, match=r"0\.0 GB of decoded images, but the disk has 0\.0 GB free: free some"):
        in_store(photos)
    monkeypatch.undo()
    assert np.array_equal(in_store(photos).images, plain(photos))


@pytest.mark.fault(151)
def test_without_room_in_the_users_cache_they_are_decoded_in_memory(photos, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(photos.parent / "user"))
    monkeypatch.setattr(store, "FEWEST_FILES", 1)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 100))
    assert np.array_equal(decoded(photos, NAMES, SIZE, resize=False).images, plain(photos))
    assert "the images are decoded again next time" in capsys.readouterr().err
    monkeypatch.setattr(store, "free_memory", lambda: 100)
    with pytest.raises(ResourceError, match="but the disk has"):
        decoded(photos, NAMES, SIZE, resize=False)


@pytest.mark.fault(151)
def test_a_place_that_cannot_be_written(photos, monkeypatch, capsys):
    (photos.parent / "file").write_text("")
    with (
        stored_in(str(photos.parent / "file")),
        pytest.raises(UsageError, match="name another folder with --data-cache"),
    ):
        decoded(photos, NAMES, SIZE, resize=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(photos.parent / "file"))
    monkeypatch.setattr(store, "FEWEST_FILES", 1)
    assert np.array_equal(decoded(photos, NAMES, SIZE, resize=False).images, plain(photos))
    assert "the images are decoded again next time" in capsys.readouterr().err


@pytest.mark.fault(151)
def test_more_than_memory_without_a_store_is_refused(photos, monkeypatch):
    monkeypatch.setattr(store, "free_memory", lambda: 700)
    with stored_in("off"), pytest.raises(ResourceError, match="12 images of 4x5 pixels do not fit into memory"):
        decoded(photos, NAMES, SIZE, resize=False)


def test_one_makes_it_and_the_others_wait(photos, capsys):
    names, found = [], []
    with pytest.MonkeyPatch.context() as patch:
        names = count_decoded(patch)
        threads = [threading.Thread(target=lambda: found.append(in_store(photos))) for _ in range(3)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert sorted(names) == NAMES
    assert all(np.array_equal(each.images, plain(photos)) for each in found) and len(found) == 3


def test_a_store_that_nothing_opened_for_a_month_is_removed(photos):
    in_store(photos, NAMES[:6])
    for each in folder(photos).iterdir():
        os.utime(each, (1, 1))
    old = folder(photos)
    own = [old.parent / "cats" / "1.png", old.with_name(f"shop-4x5-{'0' * 16}") / "1.png"]
    for each in own:  # pictures of the user's below --data-cache, where stores have a folder of the same name
        each.parent.mkdir()
        shutil.copy(photos / NAMES[0], each)
        os.utime(each, (1, 1))
    in_store(photos, NAMES[6:])
    assert not old.exists() and len(in_store(photos, NAMES[6:]).images) == 6
    assert all([*each.parent.iterdir()] == [each] for each in own)


def test_parts_of_a_map_are_read_from_their_place(photos):
    images = in_store(photos).images
    reader = RowReader(images[3:9])
    assert np.array_equal(reader.read([2, 0]), images[[5, 3]])
    assert np.array_equal(reader.read(range(6)), images[3:9])
    path = photos.parent / "own.npy"
    np.save(path, plain(photos))
    own = np.load(path, mmap_mode="r")
    assert is_mapped(own[2:]) and np.array_equal(RowReader(own[2:]).read([1]), own[3:4])
    assert not is_mapped(own[::2]) and not is_mapped(np.array(own)) and not is_mapped(np.load(path, mmap_mode="c"))


def test_thumbnails_are_kept_beside_a_store(photos, monkeypatch):
    def split() -> Split:
        return Split(in_store(photos).images, np.zeros(12, np.int64))

    wanted = duplicates.thumbnails(Split(plain(photos), np.zeros(12, np.int64)))
    assert np.array_equal(duplicates.thumbnails(split()), wanted)
    with monkeypatch.context() as patch:
        patch.setattr(duplicates, "_shrunk", None)
        assert np.array_equal(duplicates.thumbnails(split()), wanted)
    (folder(photos) / "thumbnails-16.npy").write_bytes(b"damaged")
    assert np.array_equal(duplicates.thumbnails(split()), wanted)


KILLED = """
import sys, time
from pathlib import Path
from codistill.data import Split, duplicates, store
store.BATCH = 60
whole = store._Files.batches
def slow(files, positions):
    for count, batch in enumerate(whole(files, positions)):
        yield batch
        print(count, flush=True)
        time.sleep(60 if count == int(sys.argv[3]) else 0)  # until it is killed
store._Files.batches = slow
with store.stored_in(sys.argv[2]):
    store.decoded(Path(sys.argv[1]), sorted(each.name for each in Path(sys.argv[1]).iterdir()), (4, 5), resize=False)
"""


@pytest.mark.fault(150)
@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 3, 11])
def test_a_killed_process_leaves_what_the_next_one_finishes(photos, after):
    command = [sys.executable, "-c", KILLED, str(photos), str(photos.parent / "cache"), str(after)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == after:
                process.kill()
    assert process.returncode == -signal.SIGKILL
    with pytest.MonkeyPatch.context() as patch:
        names = count_decoded(patch)
        found = in_store(photos)
    assert sorted(names) == NAMES[len(NAMES) - len(names) :] and len(names) <= 12 - after
    assert np.array_equal(found.images, plain(photos))
