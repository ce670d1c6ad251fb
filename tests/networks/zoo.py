"""Networks with the names, the order and the forward passes of RepDistiller's zoo (models/ at eedab9d)."""

import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(before: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, width, 3, stride, 1, bias=False)


class ForeignBlock(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(before, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or before != width:
            self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


def group(kind: type[nn.Module], count: int, before: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(kind(before, width, stride), *(kind(width, width, 1) for _ in range(count - 1)))


class ForeignResNet(nn.Module):
    def __init__(self, classes: int, depth: int, widths: tuple[int, ...] = (16, 16, 32, 64)) -> None:
        super().__init__()
        stem, *rest = widths
        self.conv1, self.bn1 = conv3x3(3, stem), nn.BatchNorm2d(stem)
        count = (depth - 2) // 6
        self.layer1 = group(ForeignBlock, count, stem, rest[0], 1)
        self.layer2 = group(ForeignBlock, count, rest[0], rest[1], 2)
        self.layer3 = group(ForeignBlock, count, rest[1], rest[2], 2)
        self.fc = nn.Linear(rest[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.fc(F.avg_pool2d(x, 8).flatten(1))


class ForeignWideBlock(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = conv3x3(before, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.convShortcut = None if before == width else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(x).relu()
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        return self.conv2(self.bn2(self.conv1(y)).relu()) + shortcut


class ForeignWideGroup(nn.Module):
    def __init__(self, count: int, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.layer = group(ForeignWideBlock, count, before, width, stride)


class ForeignWRN(nn.Module):
    def __init__(self, classes: int, depth: int, widening: int) -> None:
        super().__init__()
        count, width = (depth - 4) // 6, 16 * widening
        self.conv1 = conv3x3(3, 16)
        self.block1 = ForeignWideGroup(count, 16, width, 1)
        self.block2 = ForeignWideGroup(count, width, 2 * width, 2)
        self.block3 = ForeignWideGroup(count, 2 * width, 4 * width, 2)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3.layer(self.block2.layer(self.block1.layer(self.conv1(x))))
        return self.fc(F.avg_pool2d(self.bn1(x).relu(), 8).flatten(1))


class ForeignVGG(nn.Module):
    def __init__(self, classes: int, count: int) -> None:
        super().__init__()
        before = 3
        for index, width in enumerate((64, 128, 256, 512, 512)):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
            setattr(self, f"block{index}", nn.Sequential(*layers[:-1]))  # without the last ReLU
        self.classifier = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        large = x.shape[2] == 64
        for index in range(4):
            x = F.relu(getattr(self, f"block{index}")(x))
            x = F.max_pool2d(x, 2) if index < 3 or large else x
        return self.classifier(F.relu(self.block4(x)).mean((2, 3)))


X4 = (32, 64, 128, 256)
ZOO = {
    **{f"resnet{depth}": (ForeignResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet8x4": (ForeignResNet, 8, X4),
    "resnet32x4": (ForeignResNet, 32, X4),
    **{f"wrn-{depth}-{wide}": (ForeignWRN, depth, wide) for depth in (16, 40) for wide in (1, 2)},
    "vgg8": (ForeignVGG, 1),
    "vgg13": (ForeignVGG, 2),
}


def foreign(name: str, classes: int) -> nn.Module:
    """Build a network of the zoo by the name that it has here."""
    kind, *arguments = ZOO[name]
    built: nn.Module = kind(classes, *arguments)
    return built
