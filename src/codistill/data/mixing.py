"""Images that are erased in part or mixed with others, and labels as shares of classes."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Images = Float[Tensor, "image 3 height width"]


def within(box: Float[Tensor, "4 *image"], height: int, width: int) -> Bool[Tensor, "*image 1 height width"]:
    """Whether each pixel lies in the rectangle of its image: first row and column, and those behind the last."""
    top, left, bottom, right = box[..., None]
    row, column = (torch.arange(length, device=box.device) for length in (height, width))
    rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
    inside: Tensor = (rows[..., :, None] & columns[..., None, :]).unsqueeze(-3)
    return inside


def erased(images: Images, box: Float[Tensor, "4 image"]) -> Images:
    """Fill a rectangle of normalised images, in place, with the mean of the training set, 0."""
    return images.masked_fill_(within(box, *images.shape[-2:]), 0.0)


def mixed(
    images: Float[Tensor, "*view batch 3 height width"],
    partners: Float[Tensor, "*view batch 3 height width"],
    blend: Float[Tensor, "*view batch"],
    pasted: Float[Tensor, "4 *view batch"] | None,
) -> Float[Tensor, "*view batch 3 height width"]:
    """Blend images with their partners: a share of these everywhere, and all of them in a rectangle."""
    weight = blend[..., None, None, None]
    if pasted is not None:
        weight = torch.where(within(pasted, *images.shape[-2:]), 1.0, weight)
    return torch.lerp(images, partners, weight)


def soft_labels(
    labels: Int[Tensor, " batch"], classes: int, smoothing: float = 0.0, weights: Float[Tensor, " class"] | None = None
) -> Float[Tensor, "batch class"]:
    """Return the target of each image in the cross-entropy, w_y ((1 - s) [c = y] + s / C) for each class c of C.

    Args:
        labels: Class indices y.
        classes: C.
        smoothing: s, from 0 to below 1.
        weights: w, with which images of a class count; None: 1.

    Source: label smoothing of Szegedy et al., arXiv 1512.00567, section 7.
    """
    # Not one_hot, which looks at the labels from the host.
    is_true = labels[:, None] == torch.arange(classes, device=labels.device)
    targets = is_true.float() * (1 - smoothing) + smoothing / classes
    return targets if weights is None else targets * weights[labels][:, None]
