"""Which code made a result: the digest of the sources, and the commit of a checkout that tracks them."""

import subprocess

from codistill.core import source as module
from codistill.core.source import source


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_a_checkout_which_tracks_the_files(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    monkeypatch.setattr(module, "PACKAGE", package)

    def found():
        source.cache_clear()
        return source()

    plain = found()
    assert plain.keys() == {"source_sha256"}  # no checkout
    git(tmp_path, "init", "-q")
    assert found() == plain  # one that does not track them
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert found() == plain | {"commit": commit} and len(commit) == 40
    (package / "__init__.py").write_text("a = 2\n")
    changed = found()
    assert changed["commit"] == f"{commit}-dirty" and changed["source_sha256"] != plain["source_sha256"]
    source.cache_clear()
