"""A chain of runs in one folder, each of which teaches the next one: a teacher, assistants, a student."""

import dataclasses
from pathlib import Path

from codistill.core.console import lasting_console, note
from codistill.core.errors import DivergedError, UsageError
from codistill.core.torchrun import world_size
from codistill.deploy.run import Run
from codistill.settings.build import build_method, load_named_data, weights_of
from codistill.settings.config import RunConfig, default_config
from codistill.sweeps.naming import differences, digest
from codistill.training.resume import resume
from codistill.training.train import kept_if_used, train_from_config

METHOD = "takd"


def is_chain(config: RunConfig) -> bool:
    """Whether a run of `codistill train` is a chain: its networks are links, and not students side by side."""
    return config.method_name == METHOD and len(config.networks) > 1


def links_of(config: RunConfig, folder: Path) -> dict[Path, RunConfig]:
    """Return the runs of a chain by their folders: the first is `independent` unless the chain names a teacher.

    Weights of student0, student1, .. are those that the links begin with, in this order.

    Raises:
        UsageError: Weights of no link, or a run whose weights all would start from.
    """
    links: dict[Path, RunConfig] = {}
    teaching, files = config.teaching, weights_of(config)
    if config.train.init is not None:
        raise UsageError(f"init is {config.train.init}, but a chain has {len(config.networks)} runs: leave it out")
    for number, name in enumerate(config.networks):
        weights = (f"student0={files[number]}",) if number in files else ()
        link = dataclasses.replace(config, networks=(name,), weights=weights, teaching=teaching)
        if teaching.teacher is None:
            plain, frozen = default_config("independent"), dataclasses.replace(teaching, teacher_train=None)
            link = dataclasses.replace(link, method_name="independent", method=plain.method, teaching=frozen)
        path = folder / f"{number}-{name.partition(':')[0].replace('/', '-')}"
        links[path] = link
        teaching = dataclasses.replace(
            teaching, teacher=str(path.absolute()), teacher_predictor=None, teacher_network=None
        )
    return links


def train_chain(config: RunConfig, out: Path | None = None) -> list[Run]:
    """Train the links of a chain, each in a folder of its own below `out`, and print the error of each.

    Links that are finished are not repeated, and an interrupted one is resumed: the same command goes on.

    Args:
        config: The chain; its networks are the teacher, the assistants and the student, in this order.
        out: The folder of the chain; None: a new one below runs/.

    Returns:
        The runs, in order.

    Raises:
        UsageError: A network that cannot be built, a folder with a run of other settings, or no folder on several
            ranks; nothing was started.
        DivergedError: A link diverged, now or before; those behind it were not started.
    """
    if out is None and world_size() > 1:
        raise UsageError("a chain on several ranks needs a folder that all of them know: name it with --out (out=)")
    data = load_named_data(config)
    for link in links_of(config, Path()).values():
        build_method(link, data.num_classes, data.image_size, fresh=bool(link.weights))
    with kept_if_used(config, out) as folder:
        return train_links(config, folder)


def train_links(config: RunConfig, folder: Path) -> list[Run]:
    """Train the links of a chain in its folder; see `train_chain`."""
    from rich.table import Table

    if (folder / "config.json").exists():
        raise UsageError(f"{folder} is a run folder: choose another --out for the chain")
    links = links_of(config, folder)
    for path, link in links.items():
        if (path / "config.json").exists() and digest(Run(path).asked) != digest(link):
            raise UsageError(
                f"{path} holds a run with other settings: {differences(Run(path).asked, link)}: choose another --out"
            )
    runs = []
    for path, link in links.items():
        run = Run(path) if (path / "config.json").exists() else None
        if run is None:
            run = train_from_config(link, path)
        elif run.status == "diverged":
            raise DivergedError(f"{path} has diverged: start the chain in another --out with a lower --learning-rate")
        elif not run.finished:
            run = resume(path, config.data_dir)
        else:
            note(f"run {path} is finished")
        runs.append(run)
    table = Table("link", "network", "learned from", "top-1 error %", title=f"chain {folder}")
    for run in runs:
        source = " ".join(Path(each).name for each in run.config.teaching.teachers) or "labels"
        table.add_row(run.path.name, run.config.networks[0], source, f"{run.summary['top1_error']['student0']:.2f}")
    lasting_console(True).print(table)
    return runs
