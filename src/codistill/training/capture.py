"""Training steps of one run or several as one CUDA graph, or one after the other."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from codistill.core.console import note, warn
from codistill.core.device import critical_stream
from codistill.core.errors import UsageError
from codistill.core.randomness import Draws, seed_draws
from codistill.data.augment import BatchIndices
from codistill.training.step import TrainStep

WARM_UP_STEPS = 3


class GraphedSteps:
    """The steps of several independent runs as one CUDA graph per batch size, each run on a stream of its own.

    The first calls with a size run eagerly, on the stream that is captured later: they are real training steps, and
    make cuDNN and the allocator ready. Then the steps are captured together, and from then on replayed. Kernels and
    their order within a run are those of the run alone. What members touch stays where it is in memory.

    A device has one generator: where a member draws numbers (dropout), each gets a graph of its own, to be replayed
    after its seed was set. What is drawn on the host would be frozen in a graph: then all steps run eagerly.
    """

    def __init__(self, members: Sequence[TrainStep]) -> None:
        self.members = list(members)
        self.device = members[0].device
        self.stream = critical_stream(self.device)
        self._forks = [critical_stream(self.device) for _ in members]
        self._progress = torch.zeros((), device=self.device)
        self._calls: dict[int, int] = {}
        self._graphs: dict[int, list[tuple[torch.cuda.CUDAGraph, list[BatchIndices]]]] = {}
        # Graphs of different sizes have their memory in common: what lasts from step to step was made before them.
        self._pool = torch.cuda.graph_pool_handle()
        self._drawing = self._frozen = False

    def __call__(self, batches: Sequence[BatchIndices], progress: Float[Tensor, ""], seeds: Sequence[int]) -> None:
        """Train each run on its batch, drawing from its seed, and add its loss terms to its `sums`."""
        size = batches[0].image.shape[-1]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self._progress.copy_(progress)
            if self._frozen or (size not in self._graphs and self._calls.get(size, 0) < WARM_UP_STEPS):
                self._calls[size] = self._calls.get(size, 0) + 1
                self._warm_up(batches, seeds)
            else:
                if size not in self._graphs:
                    self._graphs[size] = self._captured(batches)
                alone = len(self._graphs[size]) > 1
                for index, (graph, static) in enumerate(self._graphs[size]):
                    sources = [batches[index]] if alone else batches
                    for targets, tables in zip(zip(*static, strict=True), zip(*sources, strict=True), strict=True):
                        kept, new = ([each for each in side if each is not None] for side in (targets, tables))
                        if kept:
                            torch._foreach_copy_(kept, new)
                    seed_draws(seeds[index], self.device)
                    graph.replay()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _warm_up(self, batches: Sequence[BatchIndices], seeds: Sequence[int]) -> None:
        for fork, member, batch, seed in zip(self._forks, self.members, batches, seeds, strict=True):
            seed_draws(seed, self.device)
            draws = Draws(self.device)
            self._run([(fork, member, batch)])
            self._drawing |= draws.on_device()
            if draws.on_host() and not self._frozen:
                self._frozen = True
                warn(
                    f"{member.method.name} draws random numbers on the host, which a CUDA graph would repeat: the "
                    "steps run one by one, which is slower; draw with torch on the device"
                )

    def _run(self, work: Sequence[tuple[torch.cuda.Stream, TrainStep, BatchIndices]]) -> None:
        if len(self.members) == 1:
            self.members[0](work[0][2], self._progress)
            return
        for fork, member, batch in work:
            fork.wait_stream(self.stream)
            with torch.cuda.stream(fork):
                member(batch, self._progress)
        for fork, _, _ in work:
            self.stream.wait_stream(fork)

    def _captured(self, batches: Sequence[BatchIndices]) -> list[tuple[torch.cuda.CUDAGraph, list[BatchIndices]]]:
        work = list(zip(self._forks, self.members, batches, strict=True))
        return [self._capture(part) for part in ([[each] for each in work] if self._drawing else [work])]

    def _capture(
        self, work: Sequence[tuple[torch.cuda.Stream, TrainStep, BatchIndices]]
    ) -> tuple[torch.cuda.CUDAGraph, list[BatchIndices]]:
        static = [BatchIndices(*(table.clone() for table in batch.tables())) for _, _, batch in work]
        graph = torch.cuda.CUDAGraph()
        cause: BaseException | None = None
        try:
            with torch.cuda.graph(graph, self._pool, self.stream, capture_error_mode="thread_local"):
                try:
                    self._run([(fork, member, batch) for (fork, member, _), batch in zip(work, static, strict=True)])
                except BaseException as error:
                    cause = error  # leaving a failed capture raises a second error that would hide this one
                    raise
        except RuntimeError as error:
            cause = cause or error
            if not isinstance(cause, RuntimeError) or isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            names = ", ".join(sorted({member.method.name for _, member, _ in work}))
            reason = " ".join(str(cause).split())[:200]
            raise UsageError(
                f"{names} cannot be captured as a CUDA graph: does its step read from the host? Set capturable = False "
                f"in its class to run it eagerly ({reason})"
            ) from cause
        return graph, static


class EagerSteps:
    """The steps of several independent runs, one after the other, as on a CPU."""

    def __init__(self, members: Sequence[TrainStep]) -> None:
        self.members = list(members)

    def __call__(self, batches: Sequence[BatchIndices], progress: Float[Tensor, ""], seeds: Sequence[int]) -> None:
        """Train each run on its batch, drawing from its seed, and add its loss terms to its `sums`."""
        for member, batch, seed in zip(self.members, batches, seeds, strict=True):
            seed_draws(seed, member.device)
            member(batch, progress)


def make_fleet(members: Sequence[TrainStep]) -> GraphedSteps | EagerSteps:
    """Capture steps on CUDA, in one process, where every method allows it; else run them eagerly, and print why."""
    if members[0].device.type != "cuda":
        return EagerSteps(members)
    if members[0].ranks.count > 1:
        if members[0].ranks.leads:
            note("on several ranks a step is not captured as a CUDA graph")
        return EagerSteps(members)
    plain = sorted({member.method.name for member in members if not member.method.capturable})
    if plain:
        warn(f"{', '.join(plain)} cannot be captured as a CUDA graph: the steps run one by one, which is slower")
        return EagerSteps(members)
    return GraphedSteps(members)
