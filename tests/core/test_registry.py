"""Names of plug-ins: look-up, discovery, specs and options."""

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union  # noqa: F401 - in annotations that are strings

import pytest

from codistill.core.errors import UsageError
from codistill.core.registry import checked_options, near_matches, parse_spec, write_spec
from codistill.methods import METHODS, Method, MethodSettings


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """A registry over a package with two modules, one of which counts how often it is imported."""
    package = tmp_path / "colours_for_tests"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from codistill.core.registry import Registry\n"
        "COLOURS = Registry('colour', 'colours_for_tests')\nimported = []\n"
    )
    (package / "warm.py").write_text(
        "import colours_for_tests as package\n"
        "package.imported.append(__name__)\n"
        "red = package.COLOURS.register('red')('#f00')\n"
        "orange = package.COLOURS.register('orange')('#fa0')\n"
    )
    (package / "cold.py").write_text("import colours_for_tests as package\npackage.COLOURS.register('blue')('#00f')\n")
    monkeypatch.syspath_prepend(tmp_path)
    import colours_for_tests

    yield colours_for_tests
    for name in [each for each in sys.modules if each.partition(".")[0] == "colours_for_tests"]:
        del sys.modules[name]


def test_the_first_look_up_imports_all_modules_once(plugins):
    assert plugins.imported == []
    assert plugins.COLOURS["blue"] == "#00f"
    assert list(plugins.COLOURS) == ["blue", "orange", "red"]
    assert plugins.imported == ["colours_for_tests.warm"]


@pytest.mark.parametrize(
    "look_up", [list, len, lambda colours: "red" in colours, lambda colours: colours.get("red"), dict]
)
def test_every_kind_of_look_up_discovers(plugins, look_up):
    assert look_up(plugins.COLOURS)


def test_is_a_mapping(plugins):
    assert dict(plugins.COLOURS) == {"blue": "#00f", "orange": "#fa0", "red": "#f00"}
    assert len(plugins.COLOURS) == 3 and "green" not in plugins.COLOURS
    assert plugins.COLOURS.register("green")("#0f0") == plugins.COLOURS["green"] == "#0f0"


def test_an_unknown_name_names_its_neighbours(plugins):
    with pytest.raises(UsageError, match=r"^unknown colour 'orangey': did you mean orange\?$"):
        plugins.COLOURS["orangey"]
    with pytest.raises(UsageError, match=r"^unknown colour 'xyz': choose from blue, orange, red$"):
        plugins.COLOURS["xyz"]


def test_a_name_is_taken_once(plugins):
    assert plugins.COLOURS["red"] == "#f00"
    with pytest.raises(ValueError, match="two entries for the colour 'red'"):
        plugins.COLOURS.register("red")("#e00")
    assert plugins.COLOURS["red"] == "#f00"


def test_near_matches():
    known = ["resnet20", "resnet32", "wrn-16-2"]
    assert near_matches("resnet20", reversed(known)).startswith("did you mean resnet20")
    assert near_matches("wrn162", known) == "did you mean wrn-16-2?"
    assert near_matches("nothing like it", known) == "choose from resnet20, resnet32, wrn-16-2"


def test_methods_are_entered_under_their_own_names():
    assert {"independent", "ffl", "mfef"} <= set(METHODS)
    for name, method in METHODS.items():
        assert issubclass(method, Method)
        assert method.name == name
        assert issubclass(method.Settings, MethodSettings)
        assert method.__doc__


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("resnet20", ("resnet20", {})),
        ("resnet20:", ("resnet20", {})),
        ("resnet20:shortcut=A", ("resnet20", {"shortcut": "A"})),
        ("folder:resize=64,root=a=b", ("folder", {"resize": "64", "root": "a=b"})),
    ],
)
def test_parse_spec(spec, parsed):
    assert parse_spec(spec) == parsed


def test_a_spec_without_a_value_is_refused():
    with pytest.raises(UsageError, match="'resnet20:shortcut': options are written name:key=value,key=value"):
        parse_spec("resnet20:shortcut")


def test_write_spec_is_what_parse_spec_reads():
    assert write_spec("resnet20", {}) == "resnet20"
    assert write_spec("folder", {"size": 64, "flip": True}) == "folder:flip=True,size=64"


def plugin(
    num_classes: int, size: int = 32, flip: bool = True, mode: Literal["near", "far"] = "near", root: str = ""
) -> None:
    """Stand for a plug-in with an option of each type."""


@pytest.mark.parametrize(
    ("given", "typed"),
    [
        ({}, {}),
        ({"size": "64"}, {"size": 64}),
        ({"size": 64}, {"size": 64}),
        *(({"flip": text}, {"flip": True}) for text in ("true", "True", "yes", "1")),
        *(({"flip": text}, {"flip": False}) for text in ("false", "False", "no", "0")),
        ({"mode": "far", "root": "7"}, {"mode": "far", "root": "7"}),
    ],
)
def test_options_take_the_types_of_the_parameters(given, typed):
    checked = checked_options("plugin", plugin, given)
    assert checked == typed
    assert [type(value) for value in checked.values()] == [type(value) for value in typed.values()]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sise": "3"}, r"^plugin: unknown option 'sise': did you mean size\?$"),
        ({"num_classes": "3"}, r"unknown option 'num_classes'"),
        ({"size": "big"}, r"^plugin: option size is 'big': write a whole number$"),
        ({"flip": "perhaps"}, r"^plugin: option flip is 'perhaps': write true or false$"),
        ({"mode": "fat"}, r"^plugin: option mode is 'fat': choose from far, near$"),
    ],
)
def test_wrong_options_are_refused(given, says):
    with pytest.raises(UsageError, match=says):
        checked_options("plugin", plugin, given)
    with pytest.raises(UsageError, match="it has no options"):
        checked_options("plugin", lambda num_classes: None, given)


def options_of(annotation: Any, default: Any = None) -> Any:
    def build(num_classes: int, option: Any = default) -> None: ...

    build.__annotations__["option"] = annotation
    return build


@pytest.mark.fault(63)
@pytest.mark.parametrize("written", [False, True], ids=["evaluated", "postponed"])
@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        ("float", "0.5", 0.5),
        ("float", "1e-3", 1e-3),
        ("float", "2", 2.0),
        ("int", "2", 2),
        ("bool", "no", False),
        ("str", "2", "2"),
        ("int | None", "2", 2),
        ("int | None", "None", None),
        ("None | float", "none", None),
        ("Optional[bool]", "true", True),
        ("Union[int, float]", "0.5", 0.5),
        ("str | int", "7", 7),
        ("int | str", "wide", "wide"),
        ("Literal['a', 'b'] | None", "b", "b"),
        ("Literal[1, 2]", "2", 2),
        ("Annotated[int, 'pixels']", "2", 2),
        ("Path", "a/b", Path("a/b")),
        ("Any", "2", "2"),
    ],
)
def test_options_have_any_simple_annotation(annotation, text, value, written):
    build = options_of(annotation if written else eval(annotation, globals()))
    found = checked_options("mine", build, {"option": text})["option"]
    assert (found, type(found)) == (value, type(value))
    assert checked_options("mine", build, {"option": value}) == {"option": value}  # from Python, and as a spec again
    _, options = parse_spec(write_spec("mine", {"option": value}))
    assert checked_options("mine", build, options) == {"option": value}


@pytest.mark.fault(63)
@pytest.mark.parametrize(
    ("annotation", "text", "says"),
    [
        (float, "wide", "mine: option option is 'wide': write a number"),
        (float, "nan", "write a number"),
        (int | None, "0.5", "mine: option option is '0.5': write none, or write a whole number"),
        (Optional[Union[int, float]], "x", "write none, or write a whole number, or write a number"),  # noqa: UP045, UP007
        (Literal[1, 2], "3", "choose from 1, 2"),
        (list[int], "3", "mine: option option is '3': no text for list is read"),
    ],
)
def test_text_that_an_annotation_does_not_have_is_refused(annotation, text, says):
    with pytest.raises(UsageError, match=says):
        checked_options("mine", options_of(annotation), {"option": text})


@pytest.mark.fault(63)
def test_without_an_annotation_that_can_be_evaluated_the_default_tells_the_type():
    for annotation in ("OnlyForTypeCheckers", inspect.Parameter.empty):
        assert checked_options("mine", options_of(annotation, 1.0), {"option": "2"}) == {"option": 2.0}
        assert checked_options("mine", options_of(annotation, None), {"option": "2"}) == {"option": "2"}
