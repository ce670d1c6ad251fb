"""Operations on colours and places against torchvision, one image after the other."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from codistill.data.colour import recolour
from codistill.data.policy import COLOURS

OPERATIONS = {
    "none": (lambda image, factor: image, (1.0,)),
    "brightness": (F.adjust_brightness, (0.1, 1.0, 1.9)),
    "contrast": (F.adjust_contrast, (0.1, 1.0, 1.9)),
    "color": (F.adjust_saturation, (0.1, 1.0, 1.9)),
    "sharpness": (F.adjust_sharpness, (0.1, 1.0, 1.9)),
    "posterize": (lambda image, factor: F.posterize(image, int(factor)), (2.0, 5.0, 8.0)),
    "solarize": (F.solarize, (0.0, 100.0, 255.0)),
    "autocontrast": (lambda image, factor: F.autocontrast(image), (1.0,)),
    "equalize": (lambda image, factor: F.equalize(image), (1.0,)),
}


def images(count: int = 4, height: int = 40, width: int = 37) -> torch.Tensor:
    """Noise, a narrow range of values, one colour, and a gradient."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    pixels[1] = pixels[1] // 4 + 90
    pixels[2] = (200, 10, 77)
    pixels[3] = np.linspace(30, 220, width).astype(np.uint8)[None, :, None]
    return torch.from_numpy(pixels)


def one_by_one(pixels: torch.Tensor, name: str, factor: float) -> torch.Tensor:
    reference = OPERATIONS[name][0]
    return torch.stack([reference(each.permute(2, 0, 1), factor).permute(1, 2, 0) for each in pixels])


@pytest.mark.parametrize("dense", [False, True])
def test_a_batch_in_which_each_image_has_an_operation_of_its_own(dense, monkeypatch):
    cases = [(name, factor) for name, (_, factors) in OPERATIONS.items() for factor in factors]
    pixels = images().repeat(len(cases), 1, 1, 1)
    operation = torch.tensor([COLOURS.index(name) for name, _ in cases]).float().repeat_interleave(4)
    factor = torch.tensor([factor for _, factor in cases]).repeat_interleave(4)
    done = recolour(pixels.clone(), operation, factor, COLOURS[1:], dense=dense)
    for index, (name, own) in enumerate(cases):
        expected = one_by_one(images(), name, own)
        difference = (done[4 * index : 4 * index + 4].int() - expected.int()).abs()
        assert difference.max() <= 1, (name, own)
        if name in ("none", "posterize", "solarize", "equalize") or (own == 1.0 and name != "autocontrast"):
            assert not difference.any(), (name, own)
