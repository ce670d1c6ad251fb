"""Evaluation of every predictor of a method in one pass over a split."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from codistill.core.device import autocast
from codistill.core.randomness import EVALUATION_STREAM, draws_kept, seed_draws, stream_seed
from codistill.data.augment import DeviceImages
from codistill.evaluation.diversity import Diversity, DiversitySums, diversity
from codistill.evaluation.metrics import AVERAGED, ClassificationSums, Scores, read_together, scores
from codistill.evaluation.predictions import Predictions, RankingStore
from codistill.methods import Method
from codistill.methods.cohort import Images, Outputs
from codistill.methods.losses import Logits

EVALUATION_BATCH = 500
PIXELS = 2 << 20  # of a batch: images above 64x64 are evaluated in smaller batches, or their maps would fill memory


def batch_for(size: Sequence[int], most: int = EVALUATION_BATCH) -> int:
    """Return how many images of a height and width, pixels, are evaluated together."""
    height, width = size
    return max(1, min(most, PIXELS // (height * width)))


class Evaluation:
    """Score every predictor on some splits, with batch normalisation's running statistics, once an epoch.

    Everything is summed on the device, and what each predictor answered for each image is kept there. On CUDA the first
    pass runs eagerly, and where passes are `captured` those after it are one graph. The method is left in the mode,
    training or evaluation, that it was in. A network that draws numbers even in evaluation draws the same ones in each
    pass, those of the run's `seed`. `averaged` is the moving average of the method, in evaluation mode: its predictors
    are scored as `student0-ema`, ..
    """

    def __init__(
        self,
        method: Method,
        splits: Mapping[str, DeviceImages],
        precision: str = "float32",
        batch_size: int = EVALUATION_BATCH,
        captured: bool = True,
        seed: int = 0,
        averaged: Method | None = None,
    ) -> None:
        self._averaged = averaged
        self._seed = stream_seed(seed, EVALUATION_STREAM)
        self.method, self.splits, self.precision, self.batch_size = method, dict(splits), precision, batch_size
        self.device = next(iter(self.splits.values())).device
        self._sums: dict[str, dict[str, ClassificationSums]] = {name: {} for name in self.splits}
        self._rankings: dict[str, dict[str, RankingStore]] = {name: {} for name in self.splits}
        students, classes = len(method.cohort), method.num_classes
        self._diversity = {name: DiversitySums(students, classes, self.device) for name in self.splits}
        self._captured, self._passes = captured and not any(each.streams for each in self.splits.values()), 0
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def run(self, between: Callable[[], None] = lambda: None) -> None:
        """Score all images, and call `between` on the host after each batch; in a captured pass, once after all."""
        for name in self.splits:
            self._diversity[name].reset()
            for sums in self._sums[name].values():
                sums.reset()
        was_training = self.method.training
        self.method.eval()
        seed_draws(self._seed, self.device)
        try:
            if self.device.type != "cuda" or not self._captured or self._passes == 0:
                self._pass(between)
            else:
                if self._graph is None:
                    self._graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                        self._pass(lambda: None)
                self._graph.replay()
                between()
        finally:
            self.method.train(was_training)
        self._passes += 1

    def _pass(self, between: Callable[[], None]) -> None:
        for name, images in self.splits.items():
            sums, rankings = self._sums[name], self._rankings[name]
            size = batch_for(images.images.shape[1:3], self.batch_size)
            for start, (pixels, labels) in zip(range(0, len(images), size), images.batches(size), strict=True):
                with autocast(self.device, self.precision):
                    outputs, predictions = predicted(self.method, pixels, self._averaged)
                self._diversity[name].update(outputs.logits)
                for predictor, logits in predictions.items():
                    if predictor not in sums:
                        sums[predictor] = ClassificationSums(self.method.num_classes, self.device)
                        rankings[predictor] = RankingStore(len(images))
                    rankings[predictor].write(start, sums[predictor].update(logits, labels))
                between()

    def predictions(self) -> dict[str, Predictions]:
        """Return what each predictor answered in the last pass, by split; the host waits for the device."""
        found = {}
        for name, images in self.splits.items():
            labels, positions = images.labels.cpu().numpy(), np.arange(len(images.labels))
            if images.positions is not None:
                positions = images.positions.numpy()
            files = tuple(images.files[place] for place in positions) if images.files else ()
            ranked = {predictor: each.read() for predictor, each in self._rankings[name].items()}
            found[name] = Predictions(labels[positions], positions, files, ranked)
        return found

    def tensors(self) -> dict[str, Any]:
        """Return all sums by split and predictor, for `metrics.read_together`."""
        return {
            split: {
                "predictors": {name: each.tensors() for name, each in self._sums[split].items()},
                "diversity": self._diversity[split].tensors(),
            }
            for split in self.splits
        }

    @staticmethod
    def scored(numbers: Mapping[str, Any]) -> dict[str, tuple[dict[str, Scores], Diversity]]:
        """Return, for each split, scores by predictor and diversity, from the numbers of `tensors` on the host."""
        return {
            split: ({name: scores(each) for name, each in sums["predictors"].items()}, diversity(sums["diversity"]))
            for split, sums in numbers.items()
        }


def predicted(method: Method, pixels: Images, averaged: Method | None = None) -> tuple[Outputs, dict[str, Logits]]:
    """Return the outputs of a method for normalised images, and the logits of all predictors, averaged ones too."""
    outputs = method(pixels)
    named = method.predictions(outputs)
    if averaged is not None:
        named |= {name + AVERAGED: logits for name, logits in averaged.predictions(averaged(pixels)).items()}
    return outputs, named


def evaluate(
    method: Method,
    images: DeviceImages,
    precision: str = "float32",
    batch_size: int = EVALUATION_BATCH,
    averaged: Method | None = None,
) -> dict[str, Scores]:
    """Score each student, the ensemble and the fused classifier on one split once; see `Evaluation`."""
    evaluation = Evaluation(method, {"split": images}, precision, batch_size, averaged=averaged)
    with draws_kept(images.device):
        evaluation.run()
    return evaluation.scored(read_together(evaluation.tensors()))["split"][0]
