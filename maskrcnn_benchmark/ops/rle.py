"""COCO's run-length encoding of masks.

An RLE lists run lengths of 0s and 1s in turn, zeros first, down each column of the image and column after column. Its
compressed string (pycocotools `rleToString`): from the fourth run on, a run is stored as its difference to the run two
before it; a number is cut into groups of five bits, lowest first, until the rest is only copies of the sign bit; a
group becomes a character from "0" on, plus 32 when more groups follow.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from .library import LIBRARY, register_composite

# Characters of a compressed RLE; the last one has no continuation bit. pycocotools reads on and on where it has.
_COMPRESSED = re.compile(r"(?:[0-o]*[0-O])?")
_ZERO = ord("0")
# Groups of five bits that a number of 64 bits takes
_MOST_GROUPS = 13

LIBRARY.define("compress_rle(Tensor counts, Tensor offsets) -> (Tensor text, Tensor text_offsets)")
LIBRARY.define("rle_areas(Tensor text, Tensor offsets, Tensor pixels) -> Tensor")


def compress_rle(counts: Tensor, offsets: Tensor) -> list[str]:
    """Compressed strings of D run-length encodings.

    counts: [T] int64, the run lengths of all masks; offsets: [D + 1] int64, mask d owns
    `counts[offsets[d]:offsets[d + 1]]`. Both on the CPU.
    """
    text, ends = torch.ops.maskrcnn_benchmark.compress_rle(counts, offsets)
    text = text.numpy().tobytes().decode("ascii")
    return [text[start:end] for start, end in itertools.pairwise(ends.tolist())]


def rle_areas(texts: Sequence[str], pixels: np.ndarray) -> np.ndarray:
    """Areas [D] int64 of D compressed strings; -1 for one that is damaged or longer than its image of `pixels` [D]."""
    texts = [text if text.isascii() else "~" for text in texts]  # which no RLE has either
    offsets = torch.zeros(len(texts) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor([len(text) for text in texts], dtype=torch.int64), 0, out=offsets[1:])
    text = torch.frombuffer(bytearray("".join(texts).encode()) or bytearray(1), dtype=torch.uint8)
    pixels = torch.from_numpy(np.asarray(pixels, dtype=np.int64))
    return torch.ops.maskrcnn_benchmark.rle_areas(text[: int(offsets[-1])], offsets, pixels).numpy()


def sound_rle(rle: dict, height: int, width: int) -> tuple[dict, int] | None:
    """The COCO RLE as {"size": [height, width], "counts": compressed str}, and its area in pixels; None when it is
    damaged, or of another size.

    "counts" may be compressed (str or bytes) or a list of run lengths. pycocotools checks nothing: given a damaged RLE
    it reads on for ever, and what a mask is short of its image it fills with whatever is in memory.
    """
    counts = rle.get("counts")
    if list(rle.get("size", ())) != [height, width]:
        return None
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != height * width:
            return None
        counts = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", "replace")
    if not isinstance(counts, str) or not _COMPRESSED.fullmatch(counts):
        return None
    if not counts:
        return None
    length, pixels = len(counts), height * width
    text = torch.frombuffer(bytearray(2 * counts.encode()), dtype=torch.uint8)
    offsets = torch.tensor([0, length, 2 * length])
    # The second one is asked to be a pixel shorter: -1, as it covers the whole image.
    areas = torch.ops.maskrcnn_benchmark.rle_areas(text, offsets, torch.tensor([pixels, pixels - 1]))
    area, shorter = areas.tolist()
    return ({"size": [height, width], "counts": counts}, area) if area >= 0 > shorter else None


def decode_rle(rle: dict) -> np.ndarray:
    """Bitmap [height, width] uint8 of a COCO RLE, compressed or not. Raises ValueError when it is damaged."""
    sound = sound_rle(rle, *rle["size"])
    if sound is None:
        raise ValueError(f"not a COCO RLE of a mask of {rle['size'][0]} x {rle['size'][1]} pixels")
    return coco_mask.decode(sound[0])


def compress_rle_composite(counts: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    run = torch.arange(len(counts)) - torch.repeat_interleave(offsets[:-1], offsets.diff())
    differs = (run > 2).nonzero().squeeze(1)
    rest = counts.clone()
    rest[differs] -= counts[differs - 2]
    groups, used = [], []
    more = torch.ones_like(rest, dtype=torch.bool)
    while True:
        used.append(more)
        group = rest & 31
        rest = rest >> 5
        more = more & (rest != -(group >> 4))
        groups.append(group + 32 * more + _ZERO)
        if not more.any():
            break
    used = torch.stack(used, dim=1)
    text = torch.stack(groups, dim=1)[used].to(torch.uint8)
    ends = torch.cat([offsets.new_zeros(1), used.sum(dim=1).cumsum(0)])[offsets]
    return text, ends


def rle_areas_composite(text: Tensor, offsets: Tensor, pixels: Tensor) -> Tensor:
    """String by string: what it checks is what the kernel checks, with numbers of any length."""
    areas = []
    for (start, end), most in zip(itertools.pairwise(offsets.tolist()), pixels.tolist()):
        areas.append(_area(text[start:end].tolist(), most))
    return torch.tensor(areas, dtype=torch.int64)


def _area(text: list[int], pixels: int) -> int:
    runs: list[int] = []
    value = shift = 0
    for character in text:
        group = character - _ZERO
        if not 0 <= group < 64 or shift == 5 * _MOST_GROUPS:
            return -1
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        value -= (group >> 4 & 1) << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        if runs[-1] < 0:
            return -1
        value = shift = 0
    return sum(runs[1::2]) if shift == 0 and sum(runs) <= pixels else -1


register_composite("compress_rle", compress_rle_composite)
register_composite("rle_areas", rle_areas_composite)


@torch.library.register_fake("maskrcnn_benchmark::compress_rle", lib=LIBRARY)
def _(counts, offsets):
    return counts.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8), torch.empty_like(offsets)


@torch.library.register_fake("maskrcnn_benchmark::rle_areas", lib=LIBRARY)
def _(text, offsets, pixels):
    return torch.empty_like(pixels)
