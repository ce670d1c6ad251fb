"""The order of packages of docs/architecture.md, and the measures of the whole: `python -m tests.test_architecture`."""

import ast
import functools
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "codistill"
# A package imports only from those before it; the files in src/codistill itself may import from all.
ORDER = [
    *("core", "data", "networks", "modules", "methods", "settings", "evaluation"),
    *("runs", "deploy", "report", "training", "sweeps", "bench", "cli"),
]
# Imported in the functions that use them.
HEAVY = ("matplotlib", "jinja2", "rich", "tensorboard", "tyro")


class Import(NamedTuple):
    """An import statement: the file that has it, the module that it names, and whether it runs with the file."""

    source: str
    target: str
    at_import: bool


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def statements(node: ast.AST, at_import: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Find the import statements below a node, but for those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_import
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        else:
            within = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from statements(child, at_import and not within)


@functools.cache
def imports() -> list[Import]:
    files = {module_of(path): path for path in sorted(SOURCE.rglob("*.py"))}
    found = []
    for module, path in files.items():
        for statement, at_import in statements(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(statement, ast.Import):
                names = [alias.name for alias in statement.names]
            else:
                assert statement.level == 0 and statement.module, f"{path}: import by full name"
                # `from codistill.core import console` names a file, `from codistill.data import Dataset` a package.
                both = [f"{statement.module}.{alias.name}" for alias in statement.names]
                names = [name if name in files else statement.module for name in both]
            found += [Import(module, name, at_import) for name in names]
    return found


def package(module: str) -> str:
    """Return the package of codistill that a module belongs to; "" for the root and for other libraries."""
    parts = module.split(".")
    return parts[1] if parts[0] == "codistill" and len(parts) > 1 and parts[1] in ORDER else ""


def circles() -> list[list[str]]:
    """Return every circle of files that import each other while they are imported."""
    edges: dict[str, set[str]] = {}
    for each in imports():
        if each.at_import and each.target.startswith("codistill") and each.target != each.source:
            edges.setdefault(each.source, set()).add(each.target)
    found, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(edges.get(module, ())):
                visit(target, [*path, module])
            done.add(module)

    for module in sorted(edges):
        visit(module, [])
    return found


def floors() -> list[str]:
    """Return the longest chain of packages that import each other, lowest first."""
    chains: dict[str, list[str]] = {}
    for name in ORDER:
        below = {package(each.target) for each in imports() if package(each.source) == name} & chains.keys()
        chains[name] = [*max((chains[each] for each in ORDER if each in below), key=len, default=[]), name]
    return max(chains.values(), key=len)


def top_level_names() -> list[str]:
    """Return the packages and files of src/codistill; without py.typed and caches."""
    return sorted(path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists())


def lines(folder: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob("*.py"))


def test_every_package_has_its_place() -> None:
    assert {path.parent.name for path in SOURCE.glob("*/__init__.py")} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_package_imports_only_from_those_before_it(name: str) -> None:
    allowed = {*ORDER[: ORDER.index(name) + 1]}
    wrong = [
        f"{each.source} imports {each.target}"
        for each in imports()
        if package(each.source) == name
        and each.target.split(".")[0] == "codistill"
        and package(each.target) not in allowed
    ]
    assert not wrong


def test_no_files_import_each_other_in_a_circle() -> None:
    assert not circles()


def test_only_the_command_line_knows_tyro() -> None:
    assert {package(each.source) for each in imports() if each.target.split(".")[0] == "tyro"} == {"cli"}


def test_floors_and_top_level_names_are_few() -> None:
    assert len(floors()) <= 10, floors()
    assert len(top_level_names()) <= 17, top_level_names()


def test_the_page_names_the_packages_in_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert rows[: len(ORDER)] == ORDER


def test_the_public_names_load_nothing_heavy() -> None:
    program = """
        import sys, codistill
        heavy = {*%r}
        at_once = {*sys.modules}
        for name in codistill.__all__:
            getattr(codistill, name)
        print(sorted(heavy & at_once), sorted(heavy & {*sys.modules}))
    """
    program = textwrap.dedent(program % (HEAVY,))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[] []\n"


def main() -> None:
    chain = floors()
    print(f"lines of src/: {lines(ROOT / 'src'):,}")
    for name in ORDER:
        print(f"  {name}: {lines(SOURCE / name):,}")
    print(f"lines of tests/: {lines(ROOT / 'tests'):,}")
    print(f"floors: {len(chain)} ({' < '.join(chain)})")
    print(f"top-level names: {len(top_level_names())} ({' '.join(top_level_names())})")
    print(f"circles: {len(circles())}", *(" -> ".join(each) for each in circles()), sep="\n  ")


if __name__ == "__main__":
    main()
