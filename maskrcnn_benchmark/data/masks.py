"""Directories of mask images: beside each picture one PNG in which every object has a colour of its own."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ..errors import DataError
from .content import Builder, Source, listed, split_instances
from .images import UNREADABLE

_PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
# More objects than this in one image are taken for what a lossy or antialiased mask looks like.
_MOST = 2000


def read(
    path: Path, images: str = "images", masks: str = "masks", category: str = "object", ignore: str = ""
) -> Source:
    """A directory with a directory of pictures and one of masks, `NAME.png` or `NAME_mask.png` for picture NAME.

    images, masks: their names. category: the class of all objects. ignore: colours that are no object, besides black:
    numbers separated by commas, of an RGB mask red * 65536 + green * 256 + blue.

    Raises DataError: a directory or file is missing, sizes differ, a mask that is no map of colours.
    """
    ignored = _colours(ignore)
    pictures = {p.stem: p for p in listed(path / images, "*") if p.suffix.lower() in _PICTURES}
    builder = Builder(path, path / images, {category: 1})
    for file in listed(path / masks, "*.png"):
        stem = file.stem if file.stem in pictures else file.stem.removesuffix("_mask")
        if stem not in pictures:
            raise DataError(f"{file} belongs to no picture: {path / images} has no {stem}.*")
        instance_map = read_map(file)
        image_id = builder.add_image(pictures.pop(stem).name, instance_map.shape)
        objects = split_instances(instance_map, ignored)
        if len(objects) > _MOST:
            raise DataError(f"{file} has {len(objects)} colours: it is no map of objects, or was saved with losses")
        for mask in objects.values():
            builder.add_mask(image_id, category, mask)
    for stem in pictures:
        builder.skip("a picture has no mask (a black one says that it shows no object)", pictures[stem].name)
    return builder.finish()


def read_penn_fudan(path: Path) -> Source:
    """PennFudanPed/ as it is unpacked: PNGImages/ and PedMasks/."""
    return read(path, images="PNGImages", masks="PedMasks", category="pedestrian")


def read_map(file: Path | BinaryIO) -> np.ndarray:
    """[H, W] integers: grey value, palette index, or red * 65536 + green * 256 + blue. Raises DataError."""
    try:
        with Image.open(file) as image:
            if image.mode == "CMYK":
                raise ValueError("CMYK has no values of objects")
            if image.mode in ("RGBA", "LA", "PA"):
                image = image.convert({"RGBA": "RGB", "LA": "L", "PA": "P"}[image.mode])
            pixels = np.array(image)
    except UNREADABLE as error:
        where = f" {file}" if isinstance(file, Path) else ""
        raise DataError(f"mask{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if pixels.ndim == 2:
        return pixels.astype(np.int32)
    red, green, blue = np.moveaxis(pixels.astype(np.int32), 2, 0)
    return red * 65536 + green * 256 + blue


def _colours(ignore: str) -> list[int]:
    try:
        colours = np.array([0, *(int(number) for number in ignore.split(",") if number)], np.int32)
    except (ValueError, OverflowError):
        raise DataError(f"ignore={ignore} must be whole numbers, separated by commas") from None
    return colours.tolist()
