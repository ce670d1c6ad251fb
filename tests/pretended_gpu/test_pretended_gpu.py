"""A GPU that is not there finds what it is to find, and whole trainings work on it as they do on a CPU."""

import contextlib
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import codistill as cd
from codistill.bench import measurement as bench_measurement
from codistill.cli import main

from .. import tiny
from ..faults.running import arguments, end_state, run_here
from ..pretended_gpu import GPU, Race, pretended

CUDA = torch.device("cuda")


@pytest.fixture
def gpu() -> Iterator[GPU]:
    with pretended() as device:
        yield device


@pytest.fixture
def colours(tiny_registered, tmp_path):
    return str(tiny.write_npz(tmp_path / "colours.npz", tiny.data()))


def captured(step: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


# --- what it finds ---


def test_tensors_are_there_and_give_a_cpu_s_values(gpu):
    one, other = torch.randn(4, 5), torch.randn(4, 5)
    total = one.to(CUDA) + other.to("cuda:0")
    assert total.device == torch.device("cuda:0") and total.is_cuda and not total.cpu().is_cuda
    assert torch.equal(total.cpu(), one + other)
    with pytest.raises(RuntimeError, match="same device"):
        total + one
    with pytest.raises(TypeError, match="numpy"):
        total.numpy()


def test_gradients_are_a_cpu_s(gpu):
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    images = torch.randn(5, 3, 8, 8)
    gradients = []
    for device in ("cpu", "cuda"):
        layers.zero_grad()
        layers.to(device)
        layers(images.to(device)).square().sum().backward()
        gradients.append([parameter.grad.cpu() for parameter in layers.parameters()])
    assert all(map(torch.equal, *gradients))


def test_a_graph_computes_when_it_is_replayed_with_what_is_there_then(gpu):
    value, total, factor = torch.ones(3, device=CUDA), torch.zeros(3, device=CUDA), 2.0
    graph = captured(lambda: total.add_(value * factor))
    assert total.tolist() == [0, 0, 0]
    graph.replay()
    value.fill_(5)
    factor = 100.0
    graph.replay()
    assert total.tolist() == [12, 12, 12]
    assert gpu.replays == 2


def test_what_a_capture_gives_is_garbage_until_it_is_replayed(gpu):
    value, given = torch.ones(3, device=CUDA), []
    graph = captured(lambda: given.append(value + 1))
    assert given[0].isnan().all()
    graph.replay()
    assert given[0].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "read",
    [
        lambda value: value.sum().item(),
        lambda value: value.tolist(),
        lambda value: value.cpu(),
        lambda value: value.nonzero(),
        lambda value: value[value > 0],
        lambda value: value.add_(torch.ones(3).to(CUDA)),
        lambda value: value.add_(torch.tensor(2.0, device=CUDA)),
        lambda value: torch.cuda.synchronize(),
        lambda value: torch.empty(3, pin_memory=True).copy_(value, non_blocking=True),
    ],
)
def test_a_capture_refuses_to_wait_for_the_host(gpu, read):
    value = torch.ones(3, device=CUDA)
    with pytest.raises(RuntimeError, match="previous error during capture") as caught:
        captured(lambda: read(value))
    assert "not permitted when stream is capturing" in str(caught.value.__context__)
    read(value)


def test_a_stream_must_wait_for_what_it_reads(gpu):
    side = torch.cuda.Stream()
    value = torch.ones(3, device=CUDA)
    with torch.cuda.stream(side), pytest.raises(Race, match="may not have written yet"):
        value + 1
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        more = value + 1
        with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(Race, match="may not have written yet"):
            more + 1
    with pytest.raises(Race, match="may still read"):
        value.zero_()
    torch.cuda.current_stream().wait_stream(side)
    value.zero_()


def test_freed_memory_must_not_be_in_use_on_another_stream(gpu):
    main_stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
    value = torch.ones(3, device=CUDA)
    side.wait_stream(main_stream)
    with torch.cuda.stream(side):
        value + 1
    del value
    with pytest.raises(Race, match="can be given memory"):
        torch.zeros(3, device=CUDA)


def test_a_backward_pass_runs_on_the_streams_of_the_forward_pass(gpu):
    main_stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
    weights = [torch.ones(3, device=CUDA, requires_grad=True) for _ in range(2)]
    side.wait_stream(main_stream)
    with torch.cuda.stream(side):
        branch = (weights[0] * 2).exp()
    main_stream.wait_stream(side)
    before = side.clock[side.number], main_stream.clock[main_stream.number]
    (branch * weights[1]).sum().backward()
    assert side.clock[side.number] == before[0] + 2  # of exp and of the product
    assert main_stream.clock[main_stream.number] > before[1]
    assert torch.equal(weights[0].grad.cpu(), 2 * torch.ones(3).mul(2).exp())


@pytest.mark.parametrize("kept", [True, False])
def test_what_a_branch_s_backward_pass_reads_must_outlive_it(gpu, kept):
    # Two branches; the gradient of one is used on the main stream while the other may still be at work.
    main_stream, sides = torch.cuda.current_stream(), [torch.cuda.Stream() for _ in range(2)]
    weights = [torch.ones(3, 3, device=CUDA, requires_grad=True) for _ in range(2)]
    copies = [weight * 1 for weight in weights]
    outside = [copy.detach() for copy in copies] if kept else []
    results = []
    for side, copy in zip(sides, copies, strict=True):
        side.wait_stream(main_stream)
        with torch.cuda.stream(side):
            results.append((torch.ones(3, 3, device=CUDA, requires_grad=True) @ copy).sum())
        main_stream.wait_stream(side)
    del copies, copy
    total = results[0] + results[1]
    del results
    if kept:
        total.backward()
        assert len(outside) == 2
    else:
        with pytest.raises(Race, match="can be given memory"):
            total.backward()


def test_forks_must_join_what_is_captured(gpu):
    value, side = torch.ones(3, device=CUDA), torch.cuda.Stream()

    def forked(joins: bool) -> None:
        stream = torch.cuda.current_stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            value + 1
        if joins:
            stream.wait_stream(side)

    captured(lambda: forked(joins=True)).replay()
    with pytest.raises(RuntimeError, match="unjoined work"):
        captured(lambda: forked(joins=False))
    with pytest.raises(RuntimeError, match="previous error during capture") as caught:
        captured(lambda: torch.cuda.current_stream().wait_stream(torch.cuda.Stream()))
    assert "uncaptured work" in str(caught.value.__context__)


@pytest.mark.parametrize("held", [True, False])
def test_graphs_of_a_pool_overwrite_each_other_s_memory_that_nobody_holds(gpu, held):
    value, total, pool = torch.ones(3, device=CUDA), torch.zeros(3, device=CUDA), torch.cuda.graph_pool_handle()
    first, second, made = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(first, pool):
        made.append(value + 1)
    view = made[0].host
    made = made if held else []
    with torch.cuda.graph(second, pool):
        total.add_(value)
    first.replay()
    assert view.tolist() == [2, 2, 2]
    second.replay()
    assert view.isnan().all() != held and total.tolist() == [1, 1, 1]


def test_a_graph_must_not_outlive_what_it_reads(gpu):
    value = torch.ones(3, device=CUDA)
    graph = captured(lambda: value + 1)
    graph.replay()
    del value
    with pytest.raises(Race, match="has been freed"):
        graph.replay()


def test_a_copy_that_does_not_wait_is_there_after_an_event(gpu):
    value, target, event = torch.ones(3, device=CUDA), torch.zeros(3, pin_memory=True), torch.cuda.Event()
    target.copy_(value, non_blocking=True)
    event.record()
    value.zero_()
    assert target.isnan().all()
    event.synchronize()
    assert target.tolist() == [1, 1, 1]


# --- what works on it ---


@pytest.mark.parametrize(
    "more", [(), pytest.param(("--seeds", "0", "1"), marks=pytest.mark.slow)], ids=["one", "fleet"]
)
@pytest.mark.parametrize("method", ["mfef", "kdcl", "kd"])
def test_a_captured_training_ends_as_that_of_a_cpu(colours, tmp_path, method, more):
    if method == "kd":
        assert run_here(arguments(colours, tmp_path / "teacher", method="independent")) == 0
        more = (*more, "--teacher", str(tmp_path / "teacher"))
    # Three plain steps, then a graph for each of two sizes; evaluation is a graph from the second epoch on.
    flags = ("-b", "5", "--epochs", "3", "--validation", "4", *more)
    outs = [tmp_path / device for device in ("cpu", "cuda")]
    assert run_here(arguments(colours, outs[0], *flags, "--device", "cpu", method=method)) == 0
    with pretended() as gpu:
        assert run_here(arguments(colours, outs[1], *flags, "--device", "cuda", method=method)) == 0
        # Of twelve steps four are plain: three of the first size and one of the second, which comes three times.
        assert gpu.replays >= 8
    for name in ("seed0", "seed1") if "--seeds" in more else (".",):
        assert end_state(outs[1] / name) == end_state(outs[0] / name)


def reading(gpu, terms):
    if gpu.timeline.graph is not None:  # or the trial before would see it
        terms["ce/student0"].item()


def greedy(gpu, terms):
    if gpu.timeline.graph is not None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize("seeds", [("0",), ("0", "1")])
@pytest.mark.parametrize(
    ("fault", "status", "begin", "end"),
    [
        (reading, 2, "mfef cannot be captured as a CUDA graph: does", "not permitted when stream is capturing)\n"),
        (greedy, 6, "out of memory: mfef with tiny + tiny at batch size 3", "Tried to allocate 2 GiB)\n"),
    ],
)
def test_why_a_step_cannot_be_captured(gpu, colours, tmp_path, monkeypatch, capsys, seeds, fault, status, begin, end):
    losses = cd.MFEF.losses

    def faulty(self, *arguments):
        terms = losses(self, *arguments)
        fault(gpu, terms)
        return terms

    monkeypatch.setattr(cd.MFEF, "losses", faulty)
    line = arguments(colours, tmp_path / "run", "--device", "cuda", "-b", "3", "--seeds", *seeds)
    assert run_here(line) == status
    error = capsys.readouterr().err
    assert error.startswith(f"codistill: error: {begin}") and error.endswith(end) and error.count("\n") == 1


def test_the_host_waits_once_an_epoch(colours, tmp_path):
    waits = []
    with pretended() as gpu:
        for epochs in (6, 10):
            before = gpu.timeline.waits
            line = arguments(colours, tmp_path / str(epochs), "--epochs", str(epochs), "--device", "cuda")
            assert run_here([*line, "--precision", "bf16"]) == 0
            waits.append(gpu.timeline.waits - before)
    assert waits[1] - waits[0] == 4


@pytest.mark.parametrize("networks", [pytest.param("resnet20 wrn-16-2", marks=pytest.mark.slow), "tiny tiny tiny"])
@pytest.mark.parametrize("runs", ["1", "2"])
def test_bench(gpu, monkeypatch, tiny_registered, capsys, networks, runs):
    kernel = SimpleNamespace(device_type=SimpleNamespace(name="CUDA"), name="kernel")

    @contextlib.contextmanager
    def profile(**options: Any) -> Iterator[Any]:
        before = gpu.replays
        seen: list[Any] = []
        yield SimpleNamespace(events=lambda: seen)
        seen += [kernel] * 6 * (gpu.replays - before)

    monkeypatch.setattr(bench_measurement, "profile", profile)
    line = ["bench", "mfef", "--networks", *networks.split(), "-b", "2", "--device", "cuda", "--precision", "bf16"]
    assert main([*line, "--runs", runs, "--seconds", "0.1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kernels_per_step"] * int(runs) == 6
    assert result["peak_memory_mib"] > 0 and result["environment"]["device"] == "Pretended GPU"


def test_runs_that_memory_does_not_hold_train_in_groups(gpu, colours, tmp_path, monkeypatch, capsys):
    # A step and an evaluation are said to take 15 MiB each: two graphs of steps and one of an evaluation take 45.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (150 * 2**20, 2**30))
    flags = ("--device", "cuda", "--epochs", "1", "--seeds", "0", "1", "2")
    assert run_here(arguments(colours, tmp_path / "several", *flags)) == 0
    assert "they train in 2 groups of at most 2, one after the other" in capsys.readouterr().err
    assert all(cd.Run(tmp_path / "several" / f"seed{seed}").finished for seed in range(3))


def test_a_run_s_models_work_there_and_on_a_cpu(gpu, colours, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert run_here(arguments(colours, tmp_path / "run", "--device", "cuda", "--epochs", "1")) == 0
    scores = []
    for device in ("cuda", "cpu"):
        capsys.readouterr()
        assert run_here(["evaluate", out, "--device", device, "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0] == scores[1]
    assert run_here(["export", out, "--format", "torch-export"]) == 0
