"""Transforms of two images: a partner is drawn from the data set, as it lies there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from . import geometry
from .arguments import number
from .color import blend
from .sample import Sample

Draw = Callable[[np.random.Generator], Sample]


class Mixing:
    """A transform that is called with a function that draws a partner, and with the epoch from 0, too."""

    def __call__(self, sample: Sample, rng: np.random.Generator, draw: Draw, epoch: int = 0) -> Sample:
        raise NotImplementedError


class MixupImage(Mixing):
    """PaddleX's: both images laid over each other from the top left corner, on black, with the objects of both.

    Args:
        alpha, beta: the first one's share is drawn from this beta distribution.
        mixup_epoch: it is done in the first so many epochs, and in none for -1 (PaddleX's default); None: in all.
        prob: of it.
    """

    def __init__(
        self, alpha: float = 1.5, beta: float = 1.5, mixup_epoch: int | None = None, prob: float = 1.0
    ) -> None:
        self.alpha, self.beta = number("MixupImage alpha", alpha, 1e-3), number("MixupImage beta", beta, 1e-3)
        self.epochs = float("inf") if mixup_epoch is None else number("MixupImage mixup_epoch", mixup_epoch, -1)
        self.prob = number("MixupImage prob", prob, 0, 1)

    def __call__(self, sample: Sample, rng: np.random.Generator, draw: Draw, epoch: int = 0) -> Sample:
        if epoch >= self.epochs or rng.random() >= self.prob:
            return sample
        share, partner = rng.beta(self.alpha, self.beta), draw(rng)
        height, width = np.maximum(sample.size, partner.size).tolist()
        first, second = (geometry.place(part, 0, 0, width, height, (0, 0, 0)) for part in (sample, partner))
        return replace(first.join(second), image=blend(first.image, second.image, share))


class CopyPaste(Mixing):
    """Ghiasi et al. 2021: objects of the partner are pasted, pixel by pixel, over the image; what they hide is taken
    from the masks below, and an object that is hidden entirely is dropped. Masks become bitmaps. Without masks
    nothing is pasted.

    Args:
        prob: of it; share: of the partner's objects, each drawn apart.
        transforms: of the partner before, e.g. a flip and LargeScaleJitter.
    """

    def __init__(
        self,
        prob: float = 0.5,
        share: float = 0.5,
        transforms: Sequence[Callable[[Sample, np.random.Generator], Sample]] = (),
    ) -> None:
        self.prob, self.share = number("CopyPaste prob", prob, 0, 1), number("CopyPaste share", share, 0, 1)
        self.transforms = list(transforms)

    def __call__(self, sample: Sample, rng: np.random.Generator, draw: Draw, epoch: int = 0) -> Sample:
        if rng.random() >= self.prob:
            return sample
        partner = draw(rng)
        for transform in self.transforms:
            partner = transform(partner, rng)
        partner = partner.select(rng.random(len(partner.boxes)) < self.share)
        if not len(partner.boxes) or partner.drawn() is None:
            return sample
        return paste(sample, partner)


def paste(sample: Sample, partner: Sample) -> Sample:
    """All objects of `partner`, cut to the image of `sample`, over those of `sample`."""
    height, width = sample.size
    partner = replace(partner, polygons=None, bitmaps=partner.drawn())
    partner = geometry.crop(partner, 0, 0, width, height)
    partner = geometry.place(partner, 0, 0, width, height, (0, 0, 0))
    over = partner.bitmaps.any(axis=0)
    bitmaps = sample.drawn()
    below = replace(sample, polygons=None, bitmaps=bitmaps & ~over)
    # Only what was hidden in part gets a new box: the others keep the annotated one.
    hidden = (bitmaps & over).any(axis=(1, 2))
    bounds = geometry.mask_bounds(below)
    below.boxes = np.where(hidden[:, None], bounds, sample.boxes)
    if sample.keypoints is not None:
        below.keypoints = _hide(sample.keypoints, over)
    image = np.where(over[..., None], partner.image, sample.image)
    return geometry.clip_to_image(replace(below.join(partner), image=image))


def _hide(keypoints: np.ndarray, over: np.ndarray) -> np.ndarray:
    """keypoints [G, K, 3], those that can be seen and lie where `over` [H, W] is True as hidden ones."""
    x, y = (keypoints[..., axis].astype(np.int64).clip(0, over.shape[1 - axis] - 1) for axis in (0, 1))
    hidden = keypoints.copy()
    hidden[..., 2] = np.where(over[y, x], np.minimum(keypoints[..., 2], 1), keypoints[..., 2])
    return hidden
