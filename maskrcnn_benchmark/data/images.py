"""Image files -> RGB arrays. The size that the annotations state decides whether an EXIF rotation is applied."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ..errors import DataError

# What Pillow raises at damaged files; MemoryError where one states a piece of gigabytes that is not there
UNREADABLE = (OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError)
_EXIF_ORIENTATION = 0x0112
# First and last bytes of the formats of nearly every data set: JPEG and PNG
_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND\xaeB`\x82"}

# EXIF orientation -> the same picture upright
_UPRIGHT = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image),
}


def read_image(path: str | Path, size: tuple[int, int] | None = None, image_id: int | None = None) -> np.ndarray:
    """An image file as [H, W, 3] uint8 RGB; grayscale, palette, alpha and 16-bit files too.

    Args:
        path: any format that OpenCV reads; the name may hold any characters.
        size: the (height, width) that the annotations state. The pixels are taken as stored when they have this size
            (as pycocotools and COCO's own annotations do), turned by the EXIF orientation when they have it only then.
            None: turned by the EXIF orientation, as image viewers do.
        image_id: for error messages.

    Raises:
        DataError: unreadable, truncated or not of `size`; names the file and the image id.
    """
    where = f"image {path}" + (f" (image id {image_id})" if image_id is not None else "")
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror}") from error
    image = decode(data, where)
    if size == image.shape[:2]:
        return image
    upright = turned(image, orientation_of(data))
    if size is None or size == upright.shape[:2]:
        return upright
    stored = f"{image.shape[0]} x {image.shape[1]}"
    raise DataError(f"{where} is {stored} (height x width), but its annotation file says {size[0]} x {size[1]}")


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an image file, turned by its EXIF orientation; no pixel is decoded. Raises DataError."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or f"it is damaged or not an image ({error})"
        raise DataError(f"image {path} cannot be read: {reason}") from error
    return (width, height) if turned else (height, width)


def decode(data: bytes, where: str) -> np.ndarray:
    """The content of an image file as [H, W, 3] uint8 RGB, as stored. where: names it in messages. Raises DataError."""
    if any(data.startswith(start) and not data.endswith(end) for start, end in _ENDS.items()):
        # OpenCV 4 fills the missing part of a truncated file with gray and reports no error; PIL refuses it.
        try:
            Image.open(io.BytesIO(data)).load()
        except UNREADABLE as error:
            raise DataError(f"{where} is damaged: {error}") from error
    if data.startswith(b"\x89PNG") and not _holds_its_chunks(data):
        raise DataError(f"{where} is damaged: a piece of it is longer than the file")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise DataError(f"{where} is damaged or not an image: {error.err}") from error
    if image is None:
        raise DataError(f"{where} is damaged or not an image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)  # in place: fresh memory costs more than the exchange


def _holds_its_chunks(data: bytes) -> bool:
    """Whether the pieces of a PNG end where it does, or before. OpenCV believes their lengths: given a file of 100
    bytes it filled 4 GB."""
    at = 8
    while at + 12 <= len(data):
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return at <= len(data)


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """A stored image upright. orientation: EXIF's, 1..8."""
    return np.ascontiguousarray(_UPRIGHT[orientation](image))


def orientation_of(data: bytes) -> int:
    """The EXIF orientation, 1..8; 1 where there is none or it is broken."""
    try:
        orientation = Image.open(io.BytesIO(data)).getexif().get(_EXIF_ORIENTATION, 1)
    except UNREADABLE:
        return 1
    return orientation if orientation in _UPRIGHT else 1
