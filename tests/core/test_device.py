import pytest
import torch

from codistill.core.device import autocast, choose_device, choose_precision, fast_bf16, set_up_gpu
from codistill.core.errors import UsageError


@pytest.fixture
def gpus(monkeypatch):
    """Pretend to have a number of CUDA devices."""

    def pretend(count: int, bf16: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GTX {device}")

    return pretend


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_auto_is_the_gpu_where_there_is_one(gpus, precision):
    gpus(0)
    assert choose_device("auto", precision) == torch.device("cpu")
    gpus(1)
    assert choose_device("auto", precision).type == "cuda"
    assert choose_device("cpu", precision) == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_no_cpu(gpus):
    gpus(0)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UsageError, match=rf"^device '{name}': this machine has 0 CUDA devices: .*--device cpu"):
            choose_device(name, "float32")
    gpus(2)
    assert choose_device("cuda:1", "float32") == torch.device("cuda:1")
    with pytest.raises(UsageError, match="'cuda:2': this machine has 2 CUDA devices"):
        choose_device("cuda:2", "float32")


@pytest.mark.parametrize("name", ["", "gpu", "cudaa", "cuda:x", "cuda:-1", "mps", "meta", "xpu"])
def test_unknown_devices_are_refused(gpus, name):
    gpus(1)
    with pytest.raises(UsageError, match=f"^device '{name}': choose cpu, cuda, cuda:<number> or auto$"):
        choose_device(name, "float32")


def test_bf16_needs_a_gpu_that_can(gpus):
    gpus(1, bf16=False)
    assert choose_device("cuda", "float32").type == "cuda"
    with pytest.raises(UsageError, match=r"^precision bf16: GTX cuda.* cannot: use --precision float32$"):
        choose_device("cuda", "bf16")


def test_the_gpu_that_is_named_is_the_current_one(monkeypatch):
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for name in ("cpu", "cuda", "cuda:1"):
        set_up_gpu(torch.device(name), deterministic=False)
    assert chosen == [torch.device("cuda:1")] and torch.backends.cudnn.benchmark


def test_deterministic_algorithms_do_not_fill_memory_first(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        set_up_gpu(torch.device("cuda"), deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


def test_autocast_is_off_for_float32():
    convolution, images = torch.nn.Conv2d(3, 4, 3), torch.randn(1, 3, 5, 5)
    for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(torch.device("cpu"), precision):
            assert convolution(images).dtype == dtype


@pytest.mark.parametrize(
    ("amx", "avx", "has", "precision"),
    [(True, True, "AMX", "bf16"), (False, True, "avx512_bf16", "bf16"), (False, False, "", "float32")],
)
def test_auto_is_the_precision_that_a_cpu_computes_fast(monkeypatch, amx, avx, has, precision):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    cpu = torch.device("cpu")
    assert (fast_bf16(cpu), choose_precision("auto", cpu)) == (has, precision)
    assert [choose_precision(asked, cpu) for asked in ("float32", "bf16")] == ["float32", "bf16"]


@pytest.mark.parametrize(("generation", "precision"), [((7, 5), "float32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_bf16_from_ampere_on(monkeypatch, generation, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
    assert choose_precision("auto", torch.device("cuda")) == precision
