"""The examples of CONTRIBUTING.md are run as they stand."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks() -> dict[str, str]:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.findall(r"```python\n# (src/\S+)\n(.*?)```", text, flags=re.DOTALL)
    return dict(found)


def test_examples_train_together(tmp_path: Path) -> None:
    sources = blocks()
    assert [Path(name).parent.name for name in sources] == ["methods", "networks", "data"]
    for name, source in sources.items():
        (tmp_path / Path(name).name).write_text(source)
    assert len(sources["src/codistill/methods/mean_teacher.py"].splitlines()) < 25  # and the comment above it
    modules = [Path(name).stem for name in sources]
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        + "".join(f"import {module}\n" for module in modules)
        + "from codistill.cli import main\nsys.exit(main())\n"
    )
    out = tmp_path / "run"
    arguments = "train mean-teacher --networks small:width=4 small:width=4 --data stripes:images=128 --epochs 2 -b 32"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments.split(), "--method.temperature", "4", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["method"] == "mean-teacher"
    assert summary["top1_error"]["student0"] <= 50
    assert json.loads((out / "config.json").read_text())["method"]["temperature"] == 4.0
    for name, source in sources.items():
        installed = ROOT / name
        assert not installed.exists(), f"{name} of CONTRIBUTING.md would overwrite a file"
        assert '"""' in source
