"""Train FFL in the usual style of papers' code: the program that peers.py sets beside codistill. It imports none of it.

    python benchmarks/peer_ffl.py images.npz --depth 20 --epochs 3 --out /tmp/peer

The style is that of the authors' training script (Jangho-Kim/FFL-pytorch at 546d478), which was read for it; no line is
theirs: images go one at a time through Pillow in the workers of a DataLoader, a step is eager, the loss and the hits of
each classifier are read by the host in every step, each of two optimisers takes a step, all is evaluated after every
epoch at a batch of 100, and parameters and momentum are saved after it. It is their experiment, too: reflected padding,
two equal ResNets with a common trunk, a ramp-up of the distillation terms, learning rate 0.1 divided by ten at a half
and three quarters of the epochs.

It differs where their script does not run here or is another experiment: any device, images from a packed file with
their own statistics, as many epochs as are asked for (theirs trains one more), and a ramp-up over 80/300 of them. With
--precision bf16 the forward passes are in autocast, which theirs has not.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

PADDING = 4
TEMPERATURE = 3.0
WEIGHT_DECAY, FUSION_WEIGHT_DECAY = 1e-4, 1e-5
CLASSIFIERS = ("student0", "student1", "fused")


class PackedImages(Dataset):
    """Images of one split, one at a time: padded by reflection, mirrored, cropped, normalised."""

    def __init__(self, arrays, split, augmented):
        self.images, self.labels = arrays[f"{split}_images"], arrays[f"{split}_labels"].astype(np.int64)
        pixels = arrays["train_images"].astype(np.float64) / 255
        self.mean, self.std = (
            torch.tensor(each, dtype=torch.float32).view(3, 1, 1)
            for each in (pixels.mean((0, 1, 2)), pixels.std((0, 1, 2)))
        )
        self.augmented = augmented

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index])
        if self.augmented:
            width, height = image.size
            # Pillow cannot reflect; torchvision pads its images through NumPy, too.
            padded = np.pad(np.asarray(image), ((PADDING, PADDING), (PADDING, PADDING), (0, 0)), mode="reflect")
            image = Image.fromarray(padded)
            if torch.rand(1) < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            top, left = (int(torch.randint(0, 2 * PADDING + 1, (1,)).item()) for _ in range(2))
            image = image.crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return pixels.sub_(self.mean).div_(self.std), int(self.labels[index])


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm_of_first = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm_of_second = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, features):
        changed = F.relu(self.norm_of_first(self.first(features)), inplace=True)
        changed = self.norm_of_second(self.second(changed))
        changed += self.shortcut(features)
        return F.relu(changed, inplace=True)


def stage(before, after, stride, blocks):
    return nn.Sequential(Block(before, after, stride), *(Block(after, after, 1) for _ in range(blocks - 1)))


class Students(nn.Module):
    """Two ResNets of depth 6n+2 that share all but the last stage and the classifier."""

    def __init__(self, depth, classes):
        super().__init__()
        blocks = (depth - 2) // 6
        stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.trunk = nn.Sequential(stem, stage(16, 16, 1, blocks), stage(16, 32, 2, blocks))
        self.branches = nn.ModuleList(stage(32, 64, 2, blocks) for _ in range(2))
        self.classifiers = nn.ModuleList(nn.Linear(64, classes) for _ in range(2))
        initialise(self)

    def forward(self, images):
        shared = self.trunk(images)
        maps = [branch(shared) for branch in self.branches]
        logits = [
            classifier(F.adaptive_avg_pool2d(each, 1).flatten(1))
            for classifier, each in zip(self.classifiers, maps, strict=True)
        ]
        return logits, maps


class Fusion(nn.Module):
    """A depthwise and a pointwise convolution over both maps, and a classifier."""

    def __init__(self, classes):
        super().__init__()
        self.depthwise, self.norm_of_depthwise = (
            nn.Conv2d(128, 128, 3, 1, 1, groups=128, bias=False),
            nn.BatchNorm2d(128),
        )
        self.pointwise, self.norm_of_pointwise = nn.Conv2d(128, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.classifier = nn.Linear(64, classes)
        initialise(self)

    def forward(self, maps):
        fused = F.relu(self.norm_of_depthwise(self.depthwise(torch.cat(maps, 1))))
        fused = F.relu(self.norm_of_pointwise(self.pointwise(fused)))
        return self.classifier(F.adaptive_avg_pool2d(fused, 1).flatten(1))


def initialise(module):
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.out_channels)))


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    predicted = F.log_softmax(logits / TEMPERATURE, dim=1)
    target = (F.softmax(teacher / TEMPERATURE, dim=1) + 1e-7).detach()
    return TEMPERATURE**2 * (target * (target.log() - predicted)).sum(1).mean()


def passes(students, fusion, loader, options, weight, optimizers=()):
    """Pass over a split once, training with optimisers; return the mean loss and all classifiers' errors, percent."""
    device, training = torch.device(options.device), bool(optimizers)
    students.train(training)
    fusion.train(training)
    cross_entropy = nn.CrossEntropyLoss()
    loss_sum, hits, count, steps = 0.0, [0.0] * len(CLASSIFIERS), 0, 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            (first, second), maps = students(images)
            fused = fusion(maps)
        first, second, fused = first.float(), second.float(), fused.float()
        loss = cross_entropy(first, labels) + cross_entropy(second, labels) + cross_entropy(fused, labels)
        mean = (first + second) / 2
        loss = loss + weight * (divergence(first, fused) + divergence(second, fused) + divergence(fused, mean))
        if training:
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        loss_sum += loss.item()
        for index, logits in enumerate((first, second, fused)):
            hits[index] += (logits.argmax(1) == labels).cpu().sum().float().item()
        count, steps = count + len(labels), steps + 1
    errors = {name: 100 * (1 - each / count) for name, each in zip(CLASSIFIERS, hits, strict=True)}
    return loss_sum / steps, errors


def main(options):
    torch.manual_seed(options.seed)
    with np.load(options.images) as file:
        arrays = {name: file[name] for name in file.files}
    classes = int(arrays["train_labels"].max()) + 1
    train, test = PackedImages(arrays, "train", True), PackedImages(arrays, "test", False)
    loader = DataLoader(train, batch_size=options.batch, shuffle=True, num_workers=options.workers)
    test_loader = DataLoader(test, batch_size=100, shuffle=False, num_workers=options.workers)
    device = torch.device(options.device)
    students, fusion = Students(options.depth, classes).to(device), Fusion(classes).to(device)
    optimizers, schedules = [], []
    for module, decay in ((students, WEIGHT_DECAY), (fusion, FUSION_WEIGHT_DECAY)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=decay, nesterov=True)
        halves = [math.ceil(options.epochs / 2), math.ceil(options.epochs * 3 / 4)]
        optimizers.append(optimizer)
        schedules.append(torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=halves, gamma=0.1))
    options.out.mkdir(parents=True, exist_ok=True)
    seconds, loss = [], math.nan
    for epoch in range(options.epochs):
        weight = math.exp(-5 * (1 - min(1.0, epoch / (options.epochs * 80 / 300))) ** 2)
        started = time.perf_counter()
        loss, _ = passes(students, fusion, loader, options, weight, optimizers)
        seconds.append(time.perf_counter() - started)
        for schedule in schedules:
            schedule.step()
        with torch.no_grad():
            _, errors = passes(students, fusion, test_loader, options, 1.0)
        for name, module, optimizer in zip(("model", "module"), (students, fusion), optimizers, strict=True):
            state = {"epoch": epoch, "state_dict": module.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, options.out / f"{name}_{epoch}.pth")
        print(f"epoch {epoch + 1}: {seconds[-1]:.1f} s, loss {loss:.3f}, test errors {errors}", flush=True)
    result = {"train_seconds": seconds, "loss": loss, "errors": errors, "threads": torch.get_num_threads()}
    (options.out / "result.json").write_text(json.dumps(result) + "\n")


def parsed(written=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(written)


if __name__ == "__main__":
    main(parsed())
