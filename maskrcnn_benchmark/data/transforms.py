"""What turns a Sample into a training or test input: Compose, resizing, and every transform by its name.

In yaml, INPUT.TRANSFORMS is a list of mappings, `{type: RandomExpand, ratio: 2}`; in Python, Compose takes transforms
or the same mappings. Names and arguments are PaddleX's, or mmdetection's where only it has the transform.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from yacs.config import CfgNode

from ..errors import ConfigError
from . import geometry
from .arguments import choice, number
from .augment import LargeScaleJitter, RandomCrop, RandomExpand, RandomFlip, RandomHorizontalFlip, RandomVerticalFlip
from .auto_augment import (
    AutoAugment,
    BrightnessTransform,
    ColorTransform,
    ContrastTransform,
    EqualizeTransform,
    Rotate,
    Shear,
    Translate,
)
from .color import ColorJitter, RandomDistort
from .geometry import clip_to_image
from .mixing import CopyPaste, Draw, Mixing, MixupImage
from .sample import Polygons as Polygons
from .sample import Sample
from .sample import offsets_of as offsets_of

Transform = Callable[[Sample, np.random.Generator], Sample]


class Compose:
    """Transforms in turn; then boxes are clipped to the image, and objects with nothing left are dropped.

    transforms: callables of (Sample, Generator), or mappings `{"type": name, argument: value, ...}`.
    Raises ConfigError: an unknown name or argument, a value that cannot be.
    """

    def __init__(self, transforms: Sequence[Transform | Mapping[str, Any]]) -> None:
        self.transforms = tuple(build(transform) for transform in transforms)

    def __call__(self, sample: Sample, rng: np.random.Generator, draw: Draw | None = None, epoch: int = 0) -> Sample:
        """draw: gives another image of the data set, for transforms that mix two; epoch: from 0, for those that end."""
        for transform in self.transforms:
            if not isinstance(transform, Mixing):
                sample = transform(sample, rng)
            elif draw is not None:
                sample = transform(sample, rng, draw, epoch)
            else:
                raise ConfigError(
                    f"{type(transform).__name__} mixes images of a data set, and here is none: leave it out"
                )
        return clip_to_image(sample)

    def leave_mirroring(self) -> None:
        """Leaves the pixels of horizontal flips to the device, where nothing after them looks at pixels."""
        blind = (RandomFlip, ResizeShortSide, Resize, DropSmall, Padding, Normalize)
        for transform in itertools.takewhile(lambda t: isinstance(t, blind), reversed(self.transforms)):
            if isinstance(transform, RandomFlip):
                transform.pixels = transform.direction != "horizontal"

    @property
    def size_divisibility(self) -> int:
        """What Padding asks of batches: height and width are multiples of it."""
        strides = [transform.stride for transform in self.transforms if isinstance(transform, Padding)]
        return int(np.lcm.reduce(strides)) if strides else 1


class ResizeShortSide:
    """Resizes to a short side of `size`, less where the long side would exceed `max_size`.

    Boxes and points follow the ratio of the whole-numbered sides, per axis. How pixels are interpolated:
    geometry.resize.

    Args:
        sizes: short sides in pixels. sampling "choice": one of them is drawn; "range": any whole number from the first
            to the second.
        max_size: longest side allowed, in pixels; above 0.
        rounding "nearest": scale = min(size / short, max_size / long) and a new side is int(side * scale + .5), as in
            detectron2; "down": the short side is `size`, or, where the long one would exceed max_size, what is nearest
            to max_size * short / long, and the long one int(size * long / short), as in maskrcnn-benchmark.
        by, plus_one: of geometry.resize.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        max_size: int,
        sampling: str = "choice",
        rounding: str = "nearest",
        by: str = "opencv",
        plus_one: bool = False,
    ) -> None:
        name = type(self).__name__
        self.sizes = tuple(number(f"{name}: a size", size, 1) for size in sizes)
        self.max_size = number(f"{name} max_size", max_size, 1)
        self.sampling = choice(f"{name} sampling", sampling, ("choice", "range"))
        self.rounding = choice(f"{name} rounding", rounding, ("nearest", "down"))
        self.by, self.plus_one = choice(f"{name} by", by, ("opencv", "pillow")), plus_one
        if not self.sizes or (sampling == "range" and (len(self.sizes) != 2 or self.sizes[0] > self.sizes[1])):
            raise ConfigError(f"{name} needs one size or more, and (least, most) for a range, not {self.sizes}")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return geometry.resize(sample, *self.new_size(sample.size, self._draw(rng)), self.by, self.plus_one)

    def new_size(self, size: tuple[int, int], short: int) -> tuple[int, int]:
        """The (height, width) that an image of `size` gets for a short side of `short`."""
        if self.rounding == "down":
            least, most = min(size), max(size)
            if most / least * short > self.max_size:
                short = max(1, round(self.max_size * least / most))
            return tuple(short if side == least else int(short * most / least) for side in size)
        scale = min(short / min(size), self.max_size / max(size))
        return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))

    def _draw(self, rng: np.random.Generator) -> int:
        if self.sampling == "range":
            return int(rng.integers(self.sizes[0], self.sizes[1], endpoint=True))
        return self.sizes[rng.integers(len(self.sizes))]


class ResizeByShort(ResizeShortSide):
    """PaddleX's. short_size: one, or several of which one is drawn; max_size: longest side, -1 for any."""

    def __init__(self, short_size: int | Sequence[int] = 800, max_size: int = 1333) -> None:
        sizes = short_size if isinstance(short_size, Sequence) else (short_size,)
        super().__init__(sizes, float("inf") if max_size == -1 else max_size)


class DropSmall:
    """Drops the objects whose box is not wider and higher than `side` pixels."""

    def __init__(self, side: float = 1.0) -> None:
        self.side = number(f"{type(self).__name__} side", side, 0)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return geometry.drop_small(sample, self.side)


class Resize:
    """mmdetection's: to the largest size of the same proportions within a (long side, short side).

    Args:
        img_scale: (long, short), or several of them.
        multiscale_mode: with several, "value": one is drawn; with two, "range": each side from the one to the other.
        keep_ratio: False stretches to (width, height) exactly instead.
    """

    def __init__(self, img_scale: Sequence[Any], keep_ratio: bool = True, multiscale_mode: str = "range") -> None:
        scales = img_scale if isinstance(img_scale[0], Sequence) else [img_scale]
        self.scales = [tuple(number("Resize img_scale", side, 1) for side in scale) for scale in scales]
        self.keep_ratio = keep_ratio
        self.mode = choice("Resize multiscale_mode", multiscale_mode, ("range", "value"))
        if any(len(scale) != 2 for scale in self.scales) or (self.mode == "range" and len(self.scales) > 2):
            raise ConfigError(f"Resize img_scale must be (long, short), or two of them for a range, not {img_scale!r}")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        width, height = self._draw(rng)
        if not self.keep_ratio:
            return geometry.resize(sample, height, width)
        ratio = min(max(width, height) / max(sample.size), min(width, height) / min(sample.size))
        return geometry.resize(sample, *(max(1, int(side * ratio + 0.5)) for side in sample.size))

    def _draw(self, rng: np.random.Generator) -> tuple[int, int]:
        if self.mode == "value" or len(self.scales) == 1:
            return self.scales[rng.integers(len(self.scales))]
        long_sides, short_sides = [[pick(scale) for scale in self.scales] for pick in (max, min)]
        drawn = [int(rng.integers(min(sides), max(sides), endpoint=True)) for sides in (long_sides, short_sides)]
        return drawn[0], drawn[1]


class Padding:
    """Batches of a height and width that are multiples of `coarsest_stride`: FPN needs 32.

    The sample stays as it is, and the batch is padded, with what is zero after normalising: so the network knows where
    the image ends, and detections do not shift. The place in the list does not matter.
    """

    def __init__(self, coarsest_stride: int = 1) -> None:
        self.stride = int(number(f"{type(self).__name__}: the stride", coarsest_stride, 1))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return sample


class Pad(Padding):
    """mmdetection's name for Padding."""

    def __init__(self, size_divisor: int) -> None:
        super().__init__(size_divisor)


class Normalize:
    """Says how the weights want their pixels; the model does it, on the device, by INPUT.PIXEL_MEAN and PIXEL_STD.

    Args: mean, std: of RGB in 0..1 (PaddleX, torchvision); in 0..255 (mmdetection) when one of them is above 1.
        to_rgb: with 0..255, False: they are in the order blue, green, red, which the network then reads.
    """

    def __init__(
        self,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        to_rgb: bool = True,
    ) -> None:
        mean = [float(number("Normalize mean", value, 0, 255)) for value in mean]
        std = [float(number("Normalize std", value, 1e-6, 255)) for value in std]
        range_ = 255.0 if to_rgb and max(*mean, *std) > 1 else 1.0
        self.settings = {
            "PIXEL_MEAN": [value / range_ for value in mean],
            "PIXEL_STD": [value / range_ for value in std],
            "TO_BGR255": not to_rgb,
        }

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return sample

    def check(self, cfg: CfgNode) -> None:
        """Raises ConfigError when the model would do something else."""
        for key, value in self.settings.items():
            if not np.allclose(cfg.INPUT[key], value, atol=1e-3):
                raise ConfigError(f"INPUT.TRANSFORMS: Normalize needs INPUT.{key} {value}, but it is {cfg.INPUT[key]}")


TRANSFORMS: dict[str, type] = {
    transform.__name__: transform
    for transform in (
        *(ResizeShortSide, ResizeByShort, Resize, DropSmall, Padding, Pad, Normalize),
        *(RandomHorizontalFlip, RandomVerticalFlip, RandomFlip, RandomExpand, RandomCrop, LargeScaleJitter),
        *(ColorJitter, RandomDistort, MixupImage, CopyPaste),
        *(AutoAugment, Rotate, Translate, Shear),
        *(ColorTransform, BrightnessTransform, ContrastTransform, EqualizeTransform),
    )
}


def build(spec: Any) -> Any:
    """Mappings with a "type" become transforms, in lists too; everything else stays as it is.

    Raises ConfigError: an unknown name or argument, a value that cannot be.
    """
    if isinstance(spec, (list, tuple)):
        return [build(entry) for entry in spec]
    if not isinstance(spec, Mapping):
        return spec
    arguments = dict(spec)
    name = arguments.pop("type", None)
    if name not in TRANSFORMS:
        near = difflib.get_close_matches(str(name), TRANSFORMS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"unknown transform {name!r} in {dict(spec)}{hint} Known are {', '.join(sorted(TRANSFORMS))}")
    signature = inspect.signature(TRANSFORMS[name])
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"transform {name}: {error}; its arguments are {signature}") from error
    return TRANSFORMS[name](**{key: build(value) for key, value in arguments.items()})


def build_transforms(cfg: CfgNode, training: bool) -> Compose:
    """What INPUT asks for."""
    keys, plus_one = cfg.INPUT, cfg.MODEL.LEGACY_PLUS_ONE
    resizing = {"rounding": keys.RESIZE_ROUNDING, "by": keys.RESIZE_BY, "plus_one": plus_one}
    if not training:
        return Compose([ResizeShortSide((keys.MIN_SIZE_TEST,), keys.MAX_SIZE_TEST, **resizing)])
    if not keys.TRANSFORMS:
        resize = ResizeShortSide(keys.MIN_SIZE_TRAIN, keys.MAX_SIZE_TRAIN, keys.MIN_SIZE_TRAIN_SAMPLING, **resizing)
        flip = RandomHorizontalFlip(keys.HORIZONTAL_FLIP_PROB_TRAIN, plus_one)
        if plus_one:  # in maskrcnn-benchmark's order, which matters there: pixels' positions scale, widths do not
            return Compose([DropSmall(1), resize, flip])
        return Compose([flip, resize])  # the flip first: before it is enlarged, an image is less to turn around
    compose = Compose(keys.TRANSFORMS)
    for transform in compose.transforms:
        if isinstance(transform, Normalize):
            transform.check(cfg)
    return compose
