import threading

import pytest

from codistill.core.errors import DataError, UsageError
from codistill.data.download import fetch

from .writers import sha256


@pytest.fixture
def download(server, tmp_path):
    size, digest = len(server.content), sha256(server.content)

    def run(path=tmp_path / "data" / "file.bin", **options):
        fetch(server.url, path, size, digest, **options)
        return path

    return run


def test_fetches_and_shows_progress(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    path = tmp_path / "new" / "file.bin"
    fetch(server.url, path, len(server.content), sha256(server.content))
    assert path.read_bytes() == server.content
    assert [each.name for each in path.parent.iterdir()] == ["file.bin"]
    shown = capfd.readouterr().err
    assert "file.bin" in shown and "512.0/512.0 kB" in shown


def test_continues_after_a_cut(server, download, tmp_path):
    server.cut_after = 200_000
    with pytest.raises(DataError, match=r"file\.bin: stopped at 200000 of 512000 bytes .*run it again to continue"):
        download(tries=1)
    part = tmp_path / "data" / "file.bin.part"
    assert part.read_bytes() == server.content[:200_000] and not (tmp_path / "data" / "file.bin").exists()
    server.cut_after = None
    assert download().read_bytes() == server.content
    assert server.ranges == [None, "bytes=200000-"] and not part.exists()


def test_connects_again_by_itself(server, download):
    server.cut_after = 200_000
    assert download().read_bytes() == server.content
    assert server.ranges == [None, "bytes=200000-", "bytes=400000-"]


def test_starts_again_where_the_server_cannot_resume(server, download, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file.bin.part").write_bytes(b"something else")
    server.resumes = False
    server.cut_after = 200_000
    with pytest.raises(DataError, match="stopped at 200000"):
        download()
    assert len(server.ranges) == 2
    server.cut_after = None
    assert download().read_bytes() == server.content


def test_a_wrong_checksum_leaves_nothing_that_counts(server, download, tmp_path):
    server.content = bytes(len(server.content))
    with pytest.raises(DataError, match=r"its sha256 is [0-9a-f]{64} instead of [0-9a-f]{64}: http.* has another file"):
        download()
    assert not (tmp_path / "data" / "file.bin").exists()
    assert (tmp_path / "data" / "file.bin.part").read_bytes() == b""
    server.content = bytes(range(256)) * 2000
    assert download().read_bytes() == server.content


def test_a_longer_or_shorter_file_is_another_file(server, download):
    content = server.content
    server.content = content + b"more"
    with pytest.raises(DataError, match="has 512004 bytes instead of 512000"):
        download()
    server.content = content[:-1]
    with pytest.raises(DataError, match="stopped at 511999 of 512000 bytes"):
        download()


def test_never_overwrites(server, download, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file.bin").write_bytes(b"mine")
    assert download().read_bytes() == b"mine"
    assert server.ranges == [] and [each.name for each in (tmp_path / "data").iterdir()] == ["file.bin"]


def test_no_such_page_and_no_server(server, download, tmp_path):
    server.status = 404
    with pytest.raises(DataError, match=r"stopped at 0 of 512000 bytes \(.*404"):
        download()
    assert len(server.ranges) == 1
    with pytest.raises(DataError, match="Connection refused"):
        fetch("http://127.0.0.1:9/x", tmp_path / "x", 1, "md5:0")
    with pytest.raises(UsageError, match="http or https"):
        fetch("file:///etc/passwd", tmp_path / "x", 1, "md5:0")


def test_a_folder_that_cannot_be_written(download, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot be written"):
        download(tmp_path / "file" / "below")


def test_several_at_once_take_turns(server, download):
    errors = []

    def run():
        try:
            download()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(server.ranges) == 1
    path = download()
    assert path.read_bytes() == server.content and [each.name for each in path.parent.iterdir()] == ["file.bin"]
