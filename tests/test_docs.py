"""The docs site, whose links lead somewhere, and the notebook."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_site_builds_and_all_links_lead_somewhere(tmp_path):
    pytest.importorskip("mkdocs")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "tutorial.html", "glossary.html", "results/index.html"} <= pages.keys()
    assert "--batch-size" in pages["commands/train.html"] and "{{ options" not in "".join(pages.values())
    assert 'id="codistill.deploy.run.Run' in pages["api.html"]
    # Formulas are drawn by the browser itself.
    assert "<mfrac>" in pages["kdcl.html"] or "<msup>" in pages["kdcl.html"]
    assert not [name for name, text in pages.items() if "arithmatex" in text or re.search(r"\$\$|\$\\", text)]
    # No page asks another server for anything.
    loaded = re.compile(r'<(?:script|img|iframe)[^>]* src="https?:|<link rel="(?:stylesheet|preconnect)" href="https?:')
    assert not [name for name, text in pages.items() if loaded.search(text)]


def test_public_names_are_on_the_page_of_python():
    import codistill as cd

    page = (ROOT / "docs/api.md").read_text()
    named = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith(":::")}
    registries = {"METHODS", "NETWORKS", "DATASETS", "modules", "losses", "__version__"}
    assert {"evaluate_run" if name == "evaluate" else name for name in {*cd.__all__} - registries} <= named


def test_each_command_has_a_page():
    from codistill.cli.options import OPTIONS

    pages = {path.stem for path in (ROOT / "docs/commands").glob("*.md")}
    assert pages == OPTIONS.keys()


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["short", "whole"])
def test_the_notebook_runs(tmp_path, whole):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "docs/first-steps.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    if not whole:
        long, short = "epochs=4, settings=cd.TrainSettings(", "epochs=1, settings=cd.TrainSettings(train_limit=256, "
        (cell,) = [cell for cell in notebook.cells if long in cell.source]
        cell.source = cell.source.replace(long, short)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "student.onnx").exists()
    shown = "".join(str(cell.get("outputs", "")) for cell in notebook.cells)
    assert "image/png" in shown and "student.onnx" in shown


def test_the_page_of_kd_names_the_methods_that_a_teacher_may_stand_beside():
    from codistill.methods import METHODS

    sentence = re.search(r"The same flags work with (.*): the terms", (ROOT / "docs/kd.md").read_text())
    assert re.findall(r"`(.*?)`", sentence[1]) == [name for name, kind in METHODS.items() if kind.teacher == "allowed"]
