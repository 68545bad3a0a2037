"""Transforms of the colors alone. Images are [H, W, 3] uint8 RGB; geometry and objects stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np

from .arguments import number, span
from .sample import Sample


def blend(image: np.ndarray, other: np.ndarray | float, factor: float) -> np.ndarray:
    """factor x image + (1 - factor) x other, rounded and clipped to 0..255; a factor above 1 exaggerates."""
    mixed = image.astype(np.float32) * np.float32(factor) + np.float32(1 - factor) * other
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """0: black, 1: as it is."""
    return blend(image, 0.0, factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """0: the mean gray everywhere, 1: as it is."""
    return blend(image, float(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean()), factor)


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """0: gray, 1: as it is."""
    return blend(image, cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], factor)


def hue(image: np.ndarray, degrees: float) -> np.ndarray:
    """Turns the color circle."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # hue in 0..255, which wraps as it should
    hsv[..., 0] += np.uint8(round(degrees * 256 / 360) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def equalize(image: np.ndarray) -> np.ndarray:
    """Each channel's histogram made even."""
    return np.stack([cv2.equalizeHist(np.ascontiguousarray(image[..., c])) for c in range(3)], axis=2)


FACTORS = {"brightness": brightness, "contrast": contrast, "saturation": saturation}


class ColorJitter:
    """Brightness, contrast, saturation and hue by random amounts, in random order, as torchvision's.

    Args: brightness, contrast, saturation: a factor is drawn from max(0, 1 - x)..1 + x, or from (least, most).
        hue: a share of the color circle, 0..0.5, or (least, most) in -0.5..0.5.
        prob: of anything at all.
    """

    def __init__(
        self,
        brightness: float | tuple = 0.0,
        contrast: float | tuple = 0.0,
        saturation: float | tuple = 0.0,
        hue: float | tuple = 0.0,
        prob: float = 1.0,
    ) -> None:
        self.prob = number("ColorJitter prob", prob, 0, 1)
        factors = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        self.ranges = {name: self._range(name, value) for name, value in factors.items()}
        hue = (-hue, hue) if isinstance(hue, (int, float)) else hue
        self.ranges["hue"] = span("ColorJitter hue", hue, -0.5, 0.5)

    @staticmethod
    def _range(name: str, value: float | tuple) -> tuple[float, float]:
        if isinstance(value, (int, float)):
            value = (max(0.0, 1 - number(f"ColorJitter {name}", value, 0)), 1 + value)
        return span(f"ColorJitter {name}", value, 0)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if rng.random() >= self.prob:
            return sample
        steps = []
        for name, (low, high) in self.ranges.items():
            if name == "hue" and (low, high) != (0, 0):
                steps.append((hue, 360 * rng.uniform(low, high)))
            elif name != "hue" and (low, high) != (1, 1):
                steps.append((FACTORS[name], rng.uniform(low, high)))
        return _in_random_order(sample, steps, rng)


class RandomDistort:
    """PaddleX's: each of brightness, contrast, saturation and hue with a probability of its own, in random order.

    Args: *_range: a factor is drawn from 1 - range..1 + range; hue_range in degrees, -range..range.
    """

    def __init__(
        self,
        brightness_range: float = 0.5,
        brightness_prob: float = 0.5,
        contrast_range: float = 0.5,
        contrast_prob: float = 0.5,
        saturation_range: float = 0.5,
        saturation_prob: float = 0.5,
        hue_range: float = 18,
        hue_prob: float = 0.5,
    ) -> None:
        self.steps = (
            (brightness, 1, number("RandomDistort brightness_range", brightness_range, 0, 1), brightness_prob),
            (contrast, 1, number("RandomDistort contrast_range", contrast_range, 0, 1), contrast_prob),
            (saturation, 1, number("RandomDistort saturation_range", saturation_range, 0, 1), saturation_prob),
            (hue, 0, number("RandomDistort hue_range", hue_range, 0, 180), hue_prob),
        )
        for change, _, _, prob in self.steps:
            number(f"RandomDistort {change.__name__}_prob", prob, 0, 1)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        steps = [
            (change, rng.uniform(middle - reach, middle + reach))
            for change, middle, reach, prob in self.steps
            if rng.random() < prob
        ]
        return _in_random_order(sample, steps, rng)


def _in_random_order(
    sample: Sample, steps: list[tuple[Callable[[np.ndarray, float], np.ndarray], float]], rng: np.random.Generator
) -> Sample:
    image = sample.image
    for place in rng.permutation(len(steps)):
        change, amount = steps[place]
        image = change(image, amount)
    return replace(sample, image=image)
