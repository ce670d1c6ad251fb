"""`codistill bench`: its keys, its text, its refusals; not the speed."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from codistill.bench import bench
from codistill.bench import measurement as bench_measurement
from codistill.bench.bench import lines
from codistill.bench.limit import products_loop
from codistill.bench.loops import PlainImages, random_images
from codistill.bench.measurement import Contestant, rounds_in_turn
from codistill.cli import main
from codistill.data.augment import Augmentation
from codistill.training import compiling

from .. import tiny
from ..networks.test_chains import Uncompiled

PRODUCTS = ("aten::convolution", "aten::convolution_backward", "aten::mm", "aten::addmm", "aten::bmm")


class OperatorLog(TorchDispatchMode):
    """Names of operators with form, layout and type of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[tuple[object, ...]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        self.calls.append((func.name(), [(each.shape, each.stride(), each.dtype) for each in given]))
        return func(*args, **(kwargs or {}))


ARGUMENTS = ["bench", "mfef", "--networks", "tiny", "tiny", "-b", "64", "--seconds", "0.5", "--device", "cpu"]


def test_json(tiny_registered, capsys):
    assert main([*ARGUMENTS, "--compare", "--json", "--runs", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["method"] == "mfef" and result["networks"] == ["tiny", "tiny"] and result["runs"] == 2
    # Two runs side by side: a step of both takes twice ms_per_step.
    assert abs(result["images_per_second"] * 2 * result["ms_per_step"] / 1000 - 64) < 1e-6
    assert abs(result["plain_images_per_second"] * result["plain_ms_per_step"] / 1000 - 64) < 1e-6
    assert result["times_limit"] > 0 and result["limit_ms_per_step"] > 0
    assert result["ratio_to_plain"] > 0 and result["first_step_seconds"] > 0
    assert result["environment"]["torch"] == torch.__version__
    assert result["parameters"] > 0 and result["forward_mflop_per_image"] > 0
    # Only a GPU has kernels and memory to count, and pays for repeating bit for bit.
    absent = ("kernels_per_step", "peak_memory_mib", "deterministic_ratio")
    assert not [key for key in absent if key in result]


def test_the_plain_loop_runs_stock_pytorch_beside_compiled_chains(tiny_registered, monkeypatch, capsys):
    monkeypatch.setattr(compiling, "compiler", lambda *given: Uncompiled())
    monkeypatch.setattr(compiling, "missing_compiler", lambda device: None)
    monkeypatch.setattr(compiling, "_keep_compiled_code", lambda: None)
    plain, ours = [], []
    monkeypatch.setattr(bench, "plain_loop", watched(bench.plain_loop, plain))
    monkeypatch.setattr(bench, "resident_loop", watched(bench.resident_loop, ours))
    assert main([*ARGUMENTS, "--compare", "--compile", "on", "--seconds", "0.01"]) == 0
    assert any("norm" in name for name in plain) and not any("norm" in name for name in ours)


def watched(make: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    """Note the operators that a loop's steps dispatch."""

    def made(*given: Any) -> Callable[[int], None]:
        train = make(*given)

        def watch(steps: int) -> None:
            with OperatorLog() as log:
                train(steps)
            names.extend(name for name, _ in log.calls if "batch_norm" in name)

        return watch

    return made


def test_operators_of_one_run(tiny_registered, capsys):
    def operators(*arguments: str) -> int:
        assert main([*ARGUMENTS, *arguments, "--json", "--seconds", "0.01"]) == 0
        return json.loads(capsys.readouterr().out)["operators_per_step"]

    alone = operators()
    assert operators("--runs", "2") == alone and operators("-b", "32") == alone
    assert operators("--method.attention", "none") < alone


def test_a_taught_run_is_timed_with_its_teacher(tiny_registered, tmp_path, capsys):
    colours = str(tiny.write_npz(tmp_path / "colours.npz", tiny.data()))
    teacher, shared = str(tmp_path / "teacher"), ["--networks", "tiny", "--data", "packed", "--data-dir", colours]
    assert main(["train", "independent", *shared, "-b", "8", "--epochs", "1", "--device", "cpu", "--out", teacher]) == 0
    line = ["bench", "kd", *shared, "-b", "8", "--device", "cpu"]
    assert main(line) == 2 and "kd needs a teacher" in capsys.readouterr().err

    def operators(*arguments: str) -> int:
        assert main([*line, *arguments, "--json", "--seconds", "0.01"]) == 0
        return json.loads(capsys.readouterr().out)["operators_per_step"]

    capsys.readouterr()
    assert operators("--teacher", teacher) < operators("--teacher", teacher, teacher)


def test_the_limit_has_each_convolution_and_product_of_a_step_and_nothing_else():
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 5, 1, bias=False))
    head, images = nn.Linear(5, 2), torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    convolutions.to(memory_format=torch.channels_last)

    def train(steps: int) -> None:
        for _ in range(steps):
            head(convolutions(images).mean(dim=(2, 3))).sum().backward()

    loop = products_loop(train, torch.device("cpu"))
    expected, found = OperatorLog(), OperatorLog()
    with expected:
        train(1)
    with found:
        loop(2)
    wanted = [each for each in expected.calls if each[0].split(".")[0] in PRODUCTS]
    assert [name.split(".")[0] for name, _ in wanted].count("aten::convolution_backward") == 2
    assert len(wanted) == 4 + 3 and found.calls == wanted * 2  # the product of the head: one forward, two backward
    assert all(parameter.grad is not None for parameter in convolutions.parameters())


def test_text(tiny_registered, capsys, tmp_path):
    assert main([*ARGUMENTS, "--profile", str(tmp_path / "operators.txt")]) == 0
    text = capsys.readouterr().out
    assert "ms per step" in text and "images/s" in text and "plain" not in text
    assert "operators per step" in text and "parameters" in text and "memory is measured on CUDA only" in text
    assert "aten::convolution_backward" in (tmp_path / "operators.txt").read_text()


def test_text_of_a_gpu():
    result = {
        "method": "mfef",
        "networks": ["resnet32", "wrn-16-2"],
        "data": "folder",
        "image_size": [48, 64],
        "classes": 7,
        "batch_size": 128,
        "precision": "bf16",
        "device": "cuda:0",
        "threads": 4,
        "runs": 3,
        "ms_per_step": 2.0,
        "images_per_second": 64_000.0,
        "execution": {"compiled": False, "overlap": True},
        "kernels_per_step": 480,
        "parameters": 1000,
        "forward_mflop_per_image": 188.3,
        "peak_memory_mib": 700.0,
        "peak_reserved_mib": 900.0,
        "deterministic_ratio": 0.81,
        "limit_ms_per_step": 1.25,
        "times_limit": 1.6,
    }
    text = "\n".join(lines(result))
    timed = "mfef with resnet32 + wrn-16-2 x 3 runs on folder: 48x64 pixels, 7 classes; batch 128, bf16, cuda:0, 4 CPU "
    assert text.startswith(timed)
    for part in (
        "2.00 ms",
        "(overlap)",
        "64,000 images/s",
        "480 kernels",
        "188 MFLOP",
        "700 MiB",
        "900",
        "0.81",
        "1.25 ms",
        "1.60 times",
    ):
        assert part in text
    assert "measured on CUDA only" not in text


@pytest.mark.fault(89)
def test_the_data_that_are_named_are_timed(tiny_registered, capsys, tmp_path):
    data = ["--data", "packed", "--data-dir", str(tiny.write_npz(tmp_path / "x.npz", tiny.data(24, size=(12, 16))))]
    assert main([*ARGUMENTS, *data, "--json", "--compare", "--threads", "1", "--seconds", "0.01"]) == 0
    out, error = capsys.readouterr()
    result = json.loads(out)
    wanted = {"data": "packed", "image_size": [12, 16], "classes": 3, "training_images": 24, "batch_size": 24}
    wanted |= {"networks": ["tiny", "tiny"], "precision": "float32", "device": "cpu", "threads": 1}
    assert wanted.items() <= result.items()
    assert error.count("there are 24 training images, less than a batch of 64") == 1
    assert main([*ARGUMENTS, "--json", "--seconds", "0.01"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert (plain["data"], plain["image_size"], plain["classes"]) == ("random images", [32, 32], 100)
    assert main([*ARGUMENTS, "--data", "packed", "--data-dir", str(tmp_path / "none")]) == 3


def test_refusals(tiny_registered, capsys, tmp_path):
    assert main([*ARGUMENTS, "--runs", "0"]) == 2
    assert main([*ARGUMENTS, "--comparee"]) == 2
    assert "--compare" in capsys.readouterr().err
    assert main([*ARGUMENTS, "-b", "20000"]) == 2
    assert "10240" in capsys.readouterr().err
    assert main([*ARGUMENTS, "--stream", "on"]) == 2
    assert "bench measures steps with all images in memory: leave out --stream on" in capsys.readouterr().err
    for unlike in (["--mixup", "0.2"], ["--method.views-per-student"], ["--ema-decay", "0.9"], ["--clip-norm", "1"]):
        assert main([*ARGUMENTS, "--compare", *unlike]) == 2
        assert "--compare: the plain loop does not have " in capsys.readouterr().err
    assert main([*ARGUMENTS, "--profile", str(tmp_path / "absent" / "file")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main([*ARGUMENTS[:-1], "cuda"]) == (0 if torch.cuda.is_available() else 2)


def test_rounds_take_turns_and_keep_the_time(monkeypatch):
    now, trained = [0.0], []
    monkeypatch.setattr(bench_measurement.time, "perf_counter", lambda: now[0])

    def contestant(name: str, cost: float) -> Contestant:
        def train(steps: int) -> None:
            trained.append((name, steps))
            now[0] += steps * cost

        return Contestant(name, train, False)

    two = [contestant("fast", 0.1), contestant("slow", 1.0)]
    rounds = rounds_in_turn(two, {"fast": 1.0, "slow": 1.0}, 80.0, torch.device("cpu"))
    assert [name for name, _ in trained] == ["fast", "slow"] * (len(trained) // 2)
    # The first rounds go by the pace that was given, later ones by what was measured.
    assert trained[:4] == [("fast", 2), ("slow", 2), ("fast", 20), ("slow", 2)]
    assert rounds["fast"] == pytest.approx([0.1] * len(rounds["fast"])) and len(rounds["slow"]) == len(rounds["fast"])
    assert 80 <= now[0] < 84
    # Steps that take longer than there is time are measured once.
    now[0], only = 0.0, [contestant("endless", 100.0)]
    assert rounds_in_turn(only, {"endless": 100.0}, 1.0, torch.device("cpu")) == {"endless": [100.0]}


def test_the_plain_loop_crops_flips_and_normalises():
    data = random_images()
    torch.manual_seed(0)
    plain, split = PlainImages(data, Augmentation()), data.train
    seen = {tuple(plain[0][0][:, 16, 16].tolist()) for _ in range(60)}
    assert len(seen) > 10
    mean, std = (torch.tensor(each)[:, None, None] for each in data.statistics)
    padded = torch.nn.functional.pad(torch.from_numpy(split.images[3]).permute(2, 0, 1), (4, 4, 4, 4))
    crops = [padded[:, top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
    crops += [crop.flip(2) for crop in crops]
    for _ in range(5):
        image, label = plain[3]
        pixels = (image * std + mean).mul(255).round().to(torch.uint8)
        assert sum(torch.equal(pixels, crop) for crop in crops) == 1 and label == split.labels[3]
