"""AutoAugment: one of several policies is drawn for each image; a policy is a list of operations with levels.

Operations, names, arguments and what a level (0..10) means are those of mmdetection's configurations, e.g.

    AutoAugment(policies=[[Rotate(level=5, prob=0.5)], [Rotate(level=7), Translate(level=5, prob=0.5)]])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from . import color, geometry
from .arguments import choice, number
from .arguments import color as color_of
from .sample import Sample

MOST = 10  # level


class AutoAugment:
    """policies: lists of transforms, of which one list is drawn for each image, each as likely as the others."""

    def __init__(self, policies: Sequence[Sequence[Callable[[Sample, np.random.Generator], Sample]]]) -> None:
        number("AutoAugment: the count of policies", len(policies), 1)
        self.policies = [list(policy) for policy in policies]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        for transform in self.policies[rng.integers(len(self.policies))]:
            sample = transform(sample, rng)
        return sample


class _Leveled:
    """With probability `prob` the change of a level: level / 10 of `most`."""

    def __init__(self, level: float, prob: float) -> None:
        self.share = number(f"{type(self).__name__} level", level, 0, MOST) / MOST
        self.prob = number(f"{type(self).__name__} prob", prob, 0, 1)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return self.change(sample, rng) if rng.random() < self.prob else sample

    def change(self, sample: Sample, rng: np.random.Generator) -> Sample:
        raise NotImplementedError


class _Warp(_Leveled):
    """A change of the geometry, into the one or the other direction; what was outside the image before is filled."""

    def __init__(
        self,
        level: float,
        prob: float,
        most: float,
        random_negative_prob: float,
        img_fill_val: float | Sequence[float],
    ) -> None:
        super().__init__(level, prob)
        self.amount = self.share * most
        self.negative = number(f"{type(self).__name__} random_negative_prob", random_negative_prob, 0, 1)
        self.fill = color_of(f"{type(self).__name__} img_fill_val", img_fill_val)

    def change(self, sample: Sample, rng: np.random.Generator) -> Sample:
        amount = -self.amount if rng.random() < self.negative else self.amount
        return geometry.warp(sample, *self.map(amount, sample.size), self.fill)

    def map(self, amount: float, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The matrix [2, 2] and the shift [2] of points (x, y)."""
        raise NotImplementedError


class Rotate(_Warp):
    """Turns by level / 10 x max_rotate_angle degrees, clockwise or not, and scales, around `center` (x, y), which is
    the image's where it is not given."""

    def __init__(
        self,
        level: float,
        scale: float = 1,
        center: Sequence[float] | None = None,
        img_fill_val: float | Sequence[float] = geometry.GRAY,
        prob: float = 0.5,
        max_rotate_angle: float = 30,
        random_negative_prob: float = 0.5,
    ) -> None:
        angle = number("Rotate max_rotate_angle", max_rotate_angle, 0, 360)
        super().__init__(level, prob, angle, random_negative_prob, img_fill_val)
        self.scale, self.center = number("Rotate scale", scale, 1e-3), center

    def map(self, amount: float, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        center = np.array((size[1] / 2, size[0] / 2) if self.center is None else self.center, np.float64)
        cos, sin = self.scale * np.cos(np.radians(amount)), self.scale * np.sin(np.radians(amount))
        matrix = np.array([[cos, -sin], [sin, cos]])  # y points down: a positive angle turns clockwise
        return matrix, center - matrix @ center


class Translate(_Warp):
    """Moves by level / 10 x max_translate_offset pixels."""

    def __init__(
        self,
        level: float,
        prob: float = 0.5,
        img_fill_val: float | Sequence[float] = geometry.GRAY,
        direction: str = "horizontal",
        max_translate_offset: float = 250,
        random_negative_prob: float = 0.5,
    ) -> None:
        offset = number("Translate max_translate_offset", max_translate_offset, 0)
        super().__init__(level, prob, offset, random_negative_prob, img_fill_val)
        self.amount = int(self.amount)
        self.direction = choice("Translate direction", direction, ("horizontal", "vertical"))

    def map(self, amount: float, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        return np.eye(2), np.array((amount, 0.0) if self.direction == "horizontal" else (0.0, amount))


class Shear(_Warp):
    """Moves each row sideways (each column down) by level / 10 x max_shear_magnitude x its distance from the first."""

    def __init__(
        self,
        level: float,
        img_fill_val: float | Sequence[float] = geometry.GRAY,
        prob: float = 0.5,
        direction: str = "horizontal",
        max_shear_magnitude: float = 0.3,
        random_negative_prob: float = 0.5,
    ) -> None:
        magnitude = number("Shear max_shear_magnitude", max_shear_magnitude, 0)
        super().__init__(level, prob, magnitude, random_negative_prob, img_fill_val)
        self.direction = choice("Shear direction", direction, ("horizontal", "vertical"))

    def map(self, amount: float, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        matrix = np.array([[1, amount], [0, 1]] if self.direction == "horizontal" else [[1, 0], [amount, 1]])
        return matrix, np.zeros(2)


class _Enhance(_Leveled):
    """A change of the colors by the factor 0.1 + 1.8 x level / 10: less below level 5, more above."""

    apply: Callable[[np.ndarray, float], np.ndarray]

    def __init__(self, level: float, prob: float = 0.5) -> None:
        super().__init__(level, prob)

    def change(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return replace(sample, image=type(self).apply(sample.image, 0.1 + 1.8 * self.share))


class ColorTransform(_Enhance):
    """Saturation."""

    apply = staticmethod(color.saturation)


class BrightnessTransform(_Enhance):
    apply = staticmethod(color.brightness)


class ContrastTransform(_Enhance):
    apply = staticmethod(color.contrast)


class EqualizeTransform(_Leveled):
    """Each channel's histogram made even, with probability `prob`."""

    def __init__(self, prob: float = 0.5) -> None:
        super().__init__(0, prob)

    def change(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return replace(sample, image=color.equalize(sample.image))
