"""Every image file of a data set, read once by a pool of processes: can it be read, its size, what it shows."""

from __future__ import annotations

import hashlib
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import cv2

from ...errors import DataError
from ..images import decode, orientation_of, turned

# (items, how many, label) -> the same items; shows how far they are
Progress = Callable[[Iterable, int, str], Iterator]
# Side of the thumbnails that are compared. Files that a process gets at a time
THUMBNAIL, AT_A_TIME = 16, 8


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What an image file holds.

    problem: why training cannot read it, in the words of its error; empty where it can. stored: (height, width) of the
    pixels as stored; orientation: EXIF's, 1..8; digest: BLAKE2 hash of the file; thumbnail: THUMBNAIL^2 gray bytes,
    upright.
    """

    problem: str = ""
    stored: tuple[int, int] = (0, 0)
    orientation: int = 1
    digest: bytes = b""
    thumbnail: bytes = b""

    @property
    def upright(self) -> tuple[int, int]:
        """(height, width) turned by the EXIF orientation."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored


def scan(paths: Sequence[str], workers: int, progress: Progress, label: str) -> list[ImageFacts]:
    """The facts of each file, in their order. workers: processes; 0 or 1: this one reads.

    Raises DataError: a worker died.
    """
    if workers <= 1:
        return list(progress(map(examine, paths), len(paths), label))
    pool = ProcessPoolExecutor(min(workers, max(1, len(paths))), initializer=_start_worker)
    try:
        return list(progress(pool.map(examine, paths, chunksize=AT_A_TIME), len(paths), label))
    except BrokenProcessPool as error:
        raise DataError("a process that reads images died, perhaps out of memory: lower --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def examine(path: str) -> ImageFacts:
    """Reads the file as training does."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        image = decode(data, "it")
    except OSError as error:
        return ImageFacts(f"it cannot be read: {error.strerror}")
    except DataError as error:
        return ImageFacts(str(error))
    orientation = orientation_of(data)
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(turned(gray, orientation), (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return ImageFacts("", image.shape[:2], orientation, digest, small.tobytes())


def _start_worker() -> None:
    cv2.setNumThreads(0)
    warnings.simplefilter("ignore")  # PIL's, of broken EXIF data: it counts as none
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then ends the workers
