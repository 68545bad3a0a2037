"""Transforms of one image's geometry that are drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import geometry
from .arguments import choice, color, number, span
from .sample import Sample

# The mean of ImageNet's pixels, nearly zero once the model has normalised it
MEAN_COLOR = (123.675, 116.28, 103.53)


class RandomFlip:
    """Mirrors the image with a probability: "horizontal" (left and right) or "vertical" (top and bottom).

    plus_one: by maskrcnn-benchmark's arithmetic (geometry.py).
    pixels: False leaves those of horizontal flips to the device (Compose.leave_mirroring).
    """

    pixels = True

    def __init__(self, flip_ratio: float = 0.5, direction: str = "horizontal", plus_one: bool = False) -> None:
        self.prob = number(f"{type(self).__name__} probability", flip_ratio, 0, 1)
        self.direction = choice("RandomFlip direction", direction, ("horizontal", "vertical"))
        self.plus_one = plus_one

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if rng.random() >= self.prob:
            return sample
        return geometry.mirror(sample, self.direction == "horizontal", self.plus_one, self.pixels)


class RandomHorizontalFlip(RandomFlip):
    """Mirrors left and right with probability `prob`: x becomes width - x, with plus_one width - 1 - x."""

    def __init__(self, prob: float = 0.5, plus_one: bool = False) -> None:
        super().__init__(prob, "horizontal", plus_one)


class RandomVerticalFlip(RandomFlip):
    """Mirrors top and bottom with probability `prob`: y becomes height - y."""

    def __init__(self, prob: float = 0.5) -> None:
        super().__init__(prob, "vertical")


class RandomExpand:
    """The image somewhere on a canvas that is 1..ratio times as large, so that objects get smaller.

    Args: ratio: most; prob: of it; fill_value: RGB color of the canvas.
    """

    def __init__(self, ratio: float = 4.0, prob: float = 0.5, fill_value: float | Sequence[float] = MEAN_COLOR) -> None:
        self.ratio, self.prob = number("RandomExpand ratio", ratio, 1), number("RandomExpand prob", prob, 0, 1)
        self.fill = color("RandomExpand fill_value", fill_value)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if rng.random() >= self.prob:
            return sample
        (height, width), ratio = sample.size, rng.uniform(1, self.ratio)
        new_height, new_width = int(height * ratio), int(width * ratio)
        left, top = rng.integers(new_width - width, endpoint=True), rng.integers(new_height - height, endpoint=True)
        return geometry.place(sample, int(left), int(top), new_width, new_height, self.fill)


class RandomCrop:
    """PaddleX's (and SSD's): a random part of the image of which some object overlaps enough.

    Args:
        aspect_ratio: (least, most) of width over height, relative to the image's.
        thresholds: one is drawn: the best overlap (IoU) of an object's box and the part must reach it.
        scaling: (least, most) side of the part relative to the image's.
        num_attempts: parts tried for a threshold before another one is drawn.
        allow_no_crop: leaving the image whole is drawn as often as each threshold.
        cover_all_box: every object must reach the threshold, not only one.
    Objects are cut at the part's border; those with nothing left are dropped. Images without objects stay whole.
    """

    def __init__(
        self,
        aspect_ratio: Sequence[float] = (0.5, 2.0),
        thresholds: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9),
        scaling: Sequence[float] = (0.3, 1.0),
        num_attempts: int = 50,
        allow_no_crop: bool = True,
        cover_all_box: bool = False,
    ) -> None:
        self.aspect_ratio = span("RandomCrop aspect_ratio", aspect_ratio, 1e-3)
        self.scaling = span("RandomCrop scaling", scaling, 1e-3, 1)
        self.choices = [number("RandomCrop thresholds", threshold, 0, 1) for threshold in thresholds]
        self.choices += [None] * bool(allow_no_crop)
        self.attempts = number("RandomCrop num_attempts", num_attempts, 1)
        self.enough = np.min if cover_all_box else np.max

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if not len(sample.boxes):
            return sample
        for place in rng.permutation(len(self.choices)):
            threshold = self.choices[place]
            if threshold is None:
                return sample
            for _ in range(self.attempts):
                part = self._draw(sample.size, rng)
                if self.enough(_overlaps(sample.boxes, part)) < threshold:
                    continue
                cropped = geometry.crop(sample, *part)
                if len(cropped.boxes):
                    return cropped
        return sample

    def _draw(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(left, top, width, height) of a part."""
        height, width = size
        scale = rng.uniform(*self.scaling)
        # Limits that keep both sides within the image
        low, high = max(self.aspect_ratio[0], scale**2), min(self.aspect_ratio[1], scale**-2)
        ratio = rng.uniform(min(low, high), high)
        w, h = max(1, int(width * scale * ratio**0.5)), max(1, int(height * scale * ratio**-0.5))
        w, h = min(w, width), min(h, height)
        left, top = rng.integers(width - w, endpoint=True), rng.integers(height - h, endpoint=True)
        return int(left), int(top), w, h


def _overlaps(boxes: np.ndarray, part: tuple[int, int, int, int]) -> np.ndarray:
    """IoU [G] of each box with (left, top, width, height)."""
    left, top, width, height = part
    least, most = np.maximum(boxes[:, :2], (left, top)), np.minimum(boxes[:, 2:], (left + width, top + height))
    common = (most - least).clip(0).prod(axis=1)
    return common / ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + width * height - common)


class LargeScaleJitter:
    """A random scale, then a random part of the fixed size: Ghiasi et al. 2021, as in detectron2's LSJ recipes.

    Args:
        size: side of the square, or (height, width), in pixels. A smaller result is padded by the batch.
        min_scale, max_scale: the image is resized to fit into scale x size, its proportions kept.
    """

    def __init__(self, size: int | Sequence[int] = 1024, min_scale: float = 0.1, max_scale: float = 2.0) -> None:
        sides = size if isinstance(size, Sequence) else (size, size)
        self.height, self.width = (number("LargeScaleJitter size", side, 1) for side in sides)
        self.scales = span("LargeScaleJitter min_scale, max_scale", (min_scale, max_scale), 1e-3)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        scale = rng.uniform(*self.scales)
        ratio = min(scale * self.height / sample.size[0], scale * self.width / sample.size[1])
        height, width = (max(1, int(side * ratio + 0.5)) for side in sample.size)
        sample = geometry.resize(sample, height, width)
        left = int(rng.integers(max(0, width - self.width), endpoint=True))
        top = int(rng.integers(max(0, height - self.height), endpoint=True))
        if height <= self.height and width <= self.width:
            return sample
        return geometry.crop(sample, left, top, min(width, self.width), min(height, self.height))
