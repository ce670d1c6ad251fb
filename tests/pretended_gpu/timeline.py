"""Streams of a pretended GPU, and what has certainly happened before what."""

import bisect
import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# The last operator of each stream, by the stream's number, that is known to have happened.
Clock = dict[int, int]
CAPTURING = "CUDA error: operation not permitted when stream is capturing"
# Nodes that accumulate gradients have the greatest number.
LAST_NODE = 2**63


class Race(RuntimeError):
    """Two streams use the same memory in no certain order."""


def merge(clock: Clock, other: Clock) -> None:
    """Merge another clock into a clock."""
    for stream, moment in other.items():
        clock[stream] = max(clock.get(stream, 0), moment)


def knows(clock: Clock, other: Clock) -> bool:
    return all(clock.get(stream, 0) >= moment for stream, moment in other.items())


def spoil(tensor: Tensor) -> Tensor:
    """Leave garbage in a tensor."""
    return tensor.fill_(float("nan") if tensor.is_floating_point() else 0)


_timelines: list["Timeline"] = []


@contextlib.contextmanager
def current(timeline: "Timeline") -> Iterator["Timeline"]:
    """Attach new streams to a timeline."""
    _timelines.append(timeline)
    timeline.begin()
    try:
        yield timeline
    finally:
        _timelines.pop()


class Stream:
    """A queue of operators; `clock` says what has happened before its next one.

    Memory that is freed goes to the next operator of the stream that it was allocated on; `freed` says who used it.
    """

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.timeline = _timelines[-1]
        self.priority = priority
        self.timeline.streams.append(self)
        self.number = len(self.timeline.streams)
        self.clock: Clock = {}
        self.freed: list[Clock] = []

    def wait_stream(self, other: "Stream") -> None:
        self.timeline.let_join(self, other)
        merge(self.clock, other.clock)


class Event:
    """A moment of a stream."""

    def __init__(self, **options: Any) -> None:
        self.timeline = _timelines[-1]
        self.clock: Clock = {}
        self.stream: Stream | None = None
        self.seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self.timeline.stream()
        self.clock = dict(self.stream.clock)
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        self.timeline.host_waits(self.clock)

    def elapsed_time(self, end: "Event") -> float:
        if not all(knows(self.timeline.host, event.clock) for event in (self, end)):
            raise RuntimeError("CUDA error: device not ready")
        return max(1e-3, (end.seconds - self.seconds) * 1000)


@dataclass(eq=False)
class Memory:
    """Who allocated some memory, who wrote it last and knew what then, and who has read it since.

    Attributes:
        captured_by: The graph that it was allocated in.
        kept_for_readers: Whether the allocator waits for all streams that use it, but for those it does not know of.
        aside: Whether it was written last on a stream that autograd does not know of.
    """

    owner: Stream
    written: Clock
    known: Clock
    captured_by: object
    kept_for_readers: bool
    aside: bool = False
    read: Clock = field(default_factory=dict)
    read_aside: Clock = field(default_factory=dict)

    def __del__(self) -> None:
        users = self.read_aside if self.kept_for_readers else self.written | self.read
        if users:
            self.owner.freed.append(users)


class Timeline:
    """What happens when on a device, and when the host knows.

    Attributes:
        streams: All of them.
        chosen: The one that operators go to.
        host: What the host has waited for.
        waits: How many times the host has waited.
        graph: What is captured at the moment.
    """

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.host: Clock = {}
        self.waits = 0
        self.graph: object = None
        self._captured: set[Stream] = set()
        self._arriving: list[tuple[Clock, Tensor, Tensor]] = []
        self._turns: list[tuple[int, Stream]] = []
        self._aside: Stream | None = None

    def begin(self) -> None:
        self.chosen = self._of_backward = Stream()
        self._turned()

    @contextlib.contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        """Choose a stream; within a backward pass for what its function does itself."""
        if self.within_backward():
            beside, self._aside = self._aside, stream or self._aside
            try:
                yield
            finally:
                self._aside = beside
            return
        before = self.chosen
        self.chosen = stream or before
        self._turned()
        try:
            yield
        finally:
            self.chosen = before
            self._turned()

    def _turned(self) -> None:
        """Note that nodes of autograd that are made now belong to the chosen stream."""
        self._turns.append((torch._C._autograd._get_sequence_nr(), self.chosen))

    def stream(self) -> Stream:
        """Return the stream that an operator runs on; in a backward pass, that of the forward pass."""
        if self._aside is not None:
            return self._aside
        node = torch._C._current_autograd_node()
        if node is None:
            return self.chosen
        if node._sequence_nr() < LAST_NODE:  # else it accumulates, which it does where its gradient was computed
            place = bisect.bisect_right(self._turns, node._sequence_nr(), key=lambda turn: turn[0])
            self._of_backward = self._turns[place - 1][1]
        return self._of_backward

    @staticmethod
    def within_backward() -> bool:
        return torch._C._current_autograd_node() is not None

    def launch(self, read: Iterable[Memory], written: Iterable[Memory] = ()) -> Memory:
        """Put an operator on a stream.

        Args:
            read: What it reads.
            written: What it changes.

        Returns:
            The memory of its new outputs.

        Raises:
            Race: What another stream does with the same memory may not be over.
        """
        stream, read, written = self.stream(), list(read), list(written)
        aside, automatic = self._aside is not None, self.within_backward() and self._aside is None
        if self.graph is not None and stream not in self._captured:
            raise Race(f"stream {stream.number} is not part of what is captured")
        merge(stream.clock, self.host)
        if automatic:
            for memory in read:
                if not memory.aside:
                    merge(stream.clock, memory.known)
        known = dict(stream.clock)
        freed, stream.freed = stream.freed, []
        if not all(knows(known, users) for users in freed):
            raise Race(f"stream {stream.number} can be given memory that another stream may still use")
        if not all(knows(known, memory.written) for memory in [*read, *written]):
            raise Race(f"stream {stream.number} uses what another stream may not have written yet")
        if not all(knows(known, memory.read) for memory in written):
            raise Race(f"stream {stream.number} overwrites what another stream may still read")
        moment = {stream.number: known.get(stream.number, 0) + 1}
        merge(stream.clock, moment)
        for memory in read:
            merge(memory.read, moment)
            if aside:
                merge(memory.read_aside, moment)
        for memory in written:
            memory.written, memory.known, memory.read, memory.aside = moment, dict(stream.clock), {}, aside
        # Autograd tells the allocator where else its gradients are used.
        return Memory(stream, moment, dict(stream.clock), self.graph, automatic, aside)

    def join_after_backward(self) -> None:
        """Make the chosen stream wait for all that took part in a backward pass."""
        for stream in self.streams if self.graph is None else self._captured:
            merge(self.chosen.clock, stream.clock)

    # --- the host ---

    def refuse_in_capture(self) -> None:
        if self.graph is not None:
            raise RuntimeError(CAPTURING)

    def host_waits(self, clock: Clock) -> None:
        self.refuse_in_capture()
        self.waits += 1
        merge(self.host, clock)
        arrived = [each for each in self._arriving if knows(self.host, each[0])]
        self._arriving = [each for each in self._arriving if not knows(self.host, each[0])]
        for _, target, value in arrived:
            target.copy_(value)

    def host_reads(self, memories: Iterable[Memory]) -> None:
        self.refuse_in_capture()
        self.launch(memories)
        self.host_waits(self.chosen.clock)

    def send_to_host(self, target: Tensor, value: Tensor, memory: Memory) -> None:
        """Begin a copy that arrives when the host waits."""
        self.refuse_in_capture()
        sent = self.launch([memory])
        self._arriving.append((sent.written, target, value.clone()))
        spoil(target)

    def synchronize(self, device: Any = None) -> None:
        everything: Clock = {}
        for stream in self.streams:
            merge(everything, stream.clock)
        self.host_waits(everything)

    # --- capturing ---

    @contextlib.contextmanager
    def capturing(self, graph: object, stream: Stream) -> Iterator[None]:
        self.synchronize()
        self.graph, self._captured = graph, {stream}
        try:
            with self.on(stream):
                yield
            if not all(knows(stream.clock, other.clock) for other in self._captured):
                raise RuntimeError("CUDA error: capturing stream has unjoined work")
            merge(self.host, stream.clock)  # for nothing of it has run
        finally:
            self.graph = None

    def let_join(self, stream: Stream, other: Stream) -> None:
        """Capture a stream that waits for a captured one, too."""
        if self.graph is None:
            return
        if other in self._captured:
            self._captured.add(stream)
        elif stream in self._captured:
            raise RuntimeError("CUDA error: dependency created on uncaptured work in another stream")
