"""The tests of each fault: `python -m tests.faults.table` writes the table of docs/reliability.md."""

import ast
from collections.abc import Iterator
from pathlib import Path

from .cases import CASES

TESTS = Path(__file__).parent.parent
PAGE = TESTS.parent / "docs" / "reliability.md"
MARKER = "<!-- table: python -m tests.faults.table -->\n"


def fault_numbers(node: ast.AST) -> Iterator[int]:
    """Find each `pytest.mark.fault(number)` in a piece of syntax."""
    for each in ast.walk(node):
        if isinstance(each, ast.Call) and ast.unparse(each.func) == "pytest.mark.fault":
            yield ast.literal_eval(each.args[0])


def tests_by_case() -> dict[int, list[str]]:
    """Find the tests of each case, as FOLDER/FILE::NAME below tests/."""
    found: dict[int, list[str]] = {number: [] for number in CASES}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for number in sorted({number for each in node.decorator_list for number in fault_numbers(each)}):
                    found[number].append(f"{path.relative_to(TESTS).as_posix()}::{node.name}")
    return found


def page() -> str:
    """Return the page as it should be: the text above the marker, and the table below it."""
    prose, marker, _ = PAGE.read_text(encoding="utf-8").partition(MARKER)
    assert marker, f"{PAGE} has lost its line {MARKER}"
    lines = ["", "| # | fault | how it is injected | promise | tests |", "|---|---|---|---|---|"]
    tests = tests_by_case()
    for number, case in sorted(CASES.items()):
        names = "<br>".join(f"`{name}`" for name in tests[number])
        lines.append(f"| {number} | {case.fault} | {case.injection} | {case.promise} | {names} |")
    return prose + marker + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
