"""docs/gradient-flow.toml: what each term of each method moves, and that no two students own the same weights."""

import itertools
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import codistill as cd
from codistill.methods import METHODS, Method, MethodSettings
from codistill.networks import Network, PooledLinear
from codistill.networks.layers import conv_bn_act, initialise

TABLE = tomllib.loads((Path(__file__).parents[2] / "docs" / "gradient-flow.toml").read_text())
NAMES = list(METHODS)
TEACHABLE = [name for name in NAMES if METHODS[name].teacher != "refused" and METHODS[name].adds_teacher_terms]
SEEDS = range(6)  # so many because a hidden layer of one unit may be dead at the start
KINDS = {"branch": "branch", "branches": "branch", "enhancement": "enhancement", "enhancements": "enhancement"}
KINDS |= {"head": "head", "heads": "head", "connector": "connector", "decoder": "decoder", "embedding": "embedding"}
KINDS |= {"exits": "exit", "aggregator": "aggregator"}


def small_network() -> Network:
    """Four stages, so that byot has an exit with a hint."""
    widths, strides = (4, 6, 6, 8), (1, 1, 1, 2)
    stages = [
        conv_bn_act(before, after, 3, stride)
        for before, after, stride in zip((3, *widths), widths, strides, strict=False)
    ]
    built = Network(stages, PooledLinear(widths[-1], 3), widths)
    initialise(built)
    return built


def students_of(name: str) -> int:
    return min(3, METHODS[name].max_students or 3)


def make(name: str, seed: int, settings: MethodSettings | None = None) -> Method:
    torch.manual_seed(seed)
    method = METHODS[name]([small_network() for _ in range(students_of(name))], 3, settings, (8, 8))
    return cd.WithTeacher(method, small_network()) if method.teacher_maps else method


def parts(method: Method) -> dict[str, nn.Module]:
    """Name modules that together hold all parameters of a method, each once; those of its teacher too."""
    found: dict[str, nn.Module] = {}
    shared = method.cohort.shared_stages
    for number, stage in enumerate(method.cohort[0].stages[:shared]):
        found[f"trunk/stage{number}"] = stage
    for index, student in enumerate(method.cohort):
        for number, stage in enumerate(student.stages[shared:], start=shared):
            found[f"branch{index}/stage{number}"] = stage
        found[f"head{index}"] = student.head
    for name, module in method.named_children():
        if name in ("enhancements", "connectors", "decoders", "embeddings", "aggregators"):
            found |= {f"{name[:-1]}{index}": each for index, each in enumerate(module)}
        elif name == "assistants":
            found |= {f"assistant{number}": each for number, each in enumerate(module.layers, start=1)}
        elif name == "exits":
            for index, exits in enumerate(module):
                for number, each in enumerate(exits, start=1):
                    found |= {f"exit{index}/{number}/{part}": within for part, within in each.named_children()}
        elif name != "cohort":
            found[name] = module
    held = [id(parameter) for module in found.values() for parameter in module.parameters()]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in method.parameters()}
    if method.taught_by is not None:
        found["teacher"] = method.taught_by.network
    return found


def pattern(key: str, count: int) -> str:
    """The regular expression of a key of the table, for so many students."""
    key = key.replace("leader", f"student{count - 1}")
    key = re.escape(key).replace(r"peer\*", rf"student(?!{count - 1}\b)\*")
    return key.replace(r"\*", r"\d+")


def rows_of(name: str, term: str) -> list[str]:
    return [key for key in TABLE[name] if re.fullmatch(pattern(key, students_of(name)), term)]


def expand(group: str, term: str, count: int, known: Iterable[str]) -> set[str]:
    """Which parts a group of the table means in a term."""
    owner = re.search(r"(?:student|aggregated)(\d+)(?:/exit(\d+))?$", term)
    own, number = (int(owner[1]), int(owner[2] or 0)) if owner else (None, 0)
    others = [index for index in range(count) if index != own]
    source = [int(each) for each in re.findall(r"student(\d+)->", term)]
    whose = {
        "own": [own],
        "source": source,
        "other": others,
        "all": range(count),
        "peer": [each for each in others if each < count - 1],
    }
    word, _, kind = group.partition(" ")
    if group == "own stages up to the exit":
        return {f"branch{own}/stage{stage}" for stage in range(number + 1)} & set(known)
    if group == "own stages but the last":
        return set(sorted(part for part in known if part.startswith(f"branch{own}/"))[:-1])
    if group.startswith("own exit's "):
        kind = group.removeprefix("own exit's ")
        return {f"exit{own}/{number}/{kind}"} & set(known)
    if group == "own stages up to the hint":
        return {f"branch{own}/stage{stage}" for stage in range(METHODS["fitnets"].Settings().hint_stage + 1)}
    if kind == "exits' stages":
        return {part for part in known if re.fullmatch(rf"exit[{''.join(map(str, whose[word]))}]/\d+/stages", part)}
    wanted = {f"{KINDS[kind]}{index}" for index in whose[word]} if word in whose else {group}
    return {part for part in known if part.split("/")[0] in wanted}


def listed(name: str, term: str, known: Iterable[str]) -> set[str]:
    rows = rows_of(name, term)
    assert rows, f"docs/gradient-flow.toml: [{name}] has no row for {term}"
    assert len(rows) == 1, f"docs/gradient-flow.toml: [{name}] has several rows for {term}: {rows}"
    found: set[str] = set()
    for group in TABLE[name][rows[0]]:
        expanded = expand(group, term, students_of(name), known)
        assert expanded, f"docs/gradient-flow.toml: [{name}] has no {group!r} for {term}"
        assert not expanded & found, f"docs/gradient-flow.toml: [{name}] lists {group!r} twice for {term}"
        found |= expanded
    return found


def moved(method: Method, batch: tuple[Tensor, Tensor]) -> dict[str, set[str]]:
    """Which parts each term moves, by its own backward pass. A part is reached as a whole or not at all."""
    method = method.double()
    images, labels = batch
    if method.views > 1:
        noise = torch.randn(method.views, *images.shape, dtype=images.dtype)
        images = images + 0.1 * noise
    terms: dict[str, Tensor] = {}
    for initialising in (True, False) if method.initial_epochs(300) else (False,):
        method.initialising = initialising
        terms |= method.losses(method(images), labels, torch.tensor(1.0, dtype=torch.float64))
    named, found = parts(method), {}
    for term, value in terms.items():
        method.zero_grad()
        value.backward(retain_graph=True)
        found[term] = set()
        for part, module in named.items():
            gradients = [parameter.grad for parameter in module.parameters()]
            reached = [gradient is not None and bool(gradient.any()) for gradient in gradients]
            if any(reached):
                assert all(gradient is not None for gradient in gradients), f"{term} reaches a part of {part} only"
                # Not a rounding error, such as a bias before batch normalisation gets.
                assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-12, f"{term} in {part}"
                found[term].add(part)
    return found


def moved_under_any_seed(name: str, build, batch: tuple[Tensor, Tensor]) -> dict[str, set[str]]:
    """Which parts each term moves under some of the seeds: two, and as many more as it needs for what is listed.

    So a part that is not listed, and that both of them leave dead, is not seen.
    """
    known = parts(build(0))
    found: dict[str, set[str]] = {}
    for seed in SEEDS:
        for term, reached in moved(build(seed), batch).items():
            found.setdefault(term, set()).update(reached)
        if seed and all(reached == listed(name, term, known) for term, reached in found.items()):
            break
    return found


def assert_as_listed(name: str, found: dict[str, set[str]]) -> None:
    known = parts(make(name, 0))
    for term, reached in found.items():
        assert reached == listed(name, term, known), f"{name}: {term}"


def taught(name: str, seed: int) -> Method:
    return cd.WithTeacher(make(name, seed), small_network())


def test_the_table_has_every_method_and_no_other():
    assert sorted(TABLE) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_term_moves_what_the_table_says(name, batch):
    found = moved_under_any_seed(name, lambda seed: make(name, seed), batch)
    assert_as_listed(name, found)
    used = {row for term in found for row in rows_of(name, term)}
    assert set(TABLE[name]) - {"kl/teacher->student*"} == used


@pytest.mark.parametrize("name", TEACHABLE)
def test_each_term_moves_what_the_table_says_beside_a_teacher(name, batch):
    found = moved_under_any_seed(name, lambda seed: taught(name, seed), batch)
    assert {f"kl/teacher->student{index}" for index in range(students_of(name))} <= set(found)
    assert_as_listed(name, found)
    assert set(TABLE[name]) == {row for term in found for row in rows_of(name, term)}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TEACHABLE])
def test_no_row_of_a_teacher_that_adds_no_term(name):
    assert "kl/teacher->student*" not in TABLE[name]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mfef", {"detach_teachers": False}),
        ("mfef", {"detach_fusion_input": True}),
        ("one", {"detach_teachers": False}),
        ("okddip", {"detach_teachers": True}),
        ("rocket", {"detach_booster": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_another_flow_is_found(name, settings, batch):
    changed = METHODS[name].Settings(**settings)
    found = moved_under_any_seed(name, lambda seed: make(name, seed, changed), batch)
    with pytest.raises(AssertionError, match=f"{name}: "):
        assert_as_listed(name, found)


def test_a_missing_row_is_found(batch, monkeypatch):
    found = moved(make("ffl", 0), batch)
    monkeypatch.delitem(TABLE["ffl"], "kl/ensemble->fused")
    with pytest.raises(AssertionError, match=r"\[ffl\] has no row for kl/ensemble->fused"):
        assert_as_listed("ffl", found)


def test_patterns():
    assert rows_of("byot", "ce/student0") == ["ce/student*"]
    assert rows_of("byot", "ce/student0/exit1") == ["ce/student*/exit*"]
    assert rows_of("okddip", "kl/peers->student1") == ["kl/peers->peer*"]
    assert rows_of("okddip", "kl/peers->student2") == ["kl/peers->leader"]


def storages(modules: Iterable[nn.Module]) -> set[int]:
    """Where parameters and buffers lie in memory."""
    tensors = [tensor for each in modules for tensor in (*each.parameters(), *each.buffers())]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def assert_nothing_is_owned_twice(method: Method) -> None:
    """Branches, heads and further modules of a student, the trunk and common modules have weights of their own."""
    owned: dict[str, list[nn.Module]] = {}
    for part, module in parts(method).items():
        if part != "means":
            owned.setdefault(part.split("/")[0], []).append(module)
    if "means" in dict(method.named_children()):
        shared = method.means.shared_stages
        owned["trunk of the means"] = list(method.means[0].stages[:shared])
        for index, mean in enumerate(method.means):
            owned[f"branch of mean{index}"] = [*mean.stages[shared:], mean.head]
    owners: dict[int, str] = {}
    for owner, modules in owned.items():
        for pointer in storages(modules):
            assert pointer not in owners, f"{owner} and {owners[pointer]} have weights or statistics in common"
            owners[pointer] = owner


def real(name: str, network: str) -> Method:
    return METHODS[name]([cd.network(network, 10) for _ in range(students_of(name))], 10)


@pytest.mark.parametrize(
    ("name", "network"),
    [
        *((name, "resnet20") for name in NAMES),
        *itertools.product(("mfef", "okddip", "byot"), ("densenet-40-12", "wrn-16-2")),
    ],
)
def test_students_own_their_branches(name, network):
    method = real(name, network)
    stages = method.cohort[0].stages
    assert method.cohort.shared_stages == (0 if method.settings.shared_stages == 0 else len(stages) - 1)
    assert_nothing_is_owned_twice(method)
    # The trunk is one, and all else of a student is as large as in a student alone.
    alone = len(storages([cd.network(network, 10)]))
    trunk = storages(stages[: method.cohort.shared_stages])
    for student in method.cohort:
        assert len(storages([student])) == alone
        assert storages(student.stages[: method.cohort.shared_stages]) == trunk
    count = len(method.cohort)
    assert len(storages([method.cohort])) == count * alone - (count - 1) * len(trunk)


def test_an_aliased_block_is_found():
    method = real("okddip", "densenet-40-12")  # as in the authors' code, whose branches share the last dense block
    method.cohort[1].stages[-1][0] = method.cohort[0].stages[-1][0]
    with pytest.raises(AssertionError):
        assert_nothing_is_owned_twice(method)


def test_aliased_components_are_found():
    method = make("mfef", 0, cd.MFEF.Settings(share_components=True))
    with pytest.raises(AssertionError):
        assert_nothing_is_owned_twice(method)
