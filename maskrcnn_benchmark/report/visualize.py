"""Pictures of detections and annotations: boxes, translucent masks with contours, skeletons, names and scores.

Images are [H, W, 3] uint8 RGB arrays.
"""

from __future__ import annotations

import functools
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import DataError
from ..evaluation.coco import segmentation_to_rle
from ..ops.rle import decode_rle

logger = logging.getLogger(__name__)

Color = tuple[int, int, int]
Rect = tuple[int, int, int, int]

# Colours that people with any colour vision tell apart (Okabe & Ito 2008), without black and, last, lighter and darker
_OKABE_ITO = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
_TONES = ((0, 0.0), (255, 0.55), (0, 0.4))  # towards which grey value, how far
PALETTE: tuple[Color, ...] = tuple(
    tuple(round(channel + (grey - channel) * share) for channel in color)
    for grey, share in _TONES
    for color in _OKABE_ITO
)
_MASK_OPACITY = 0.4
# Keypoints of a lower score are not drawn; annotated ones have visibility 1 or 2
_LEAST_KEYPOINT_SCORE = 0.05
# Fonts with Chinese, Japanese and Korean characters, then one without: beginnings of file names, lower case
_CJK_FONTS = ("notosanscjk", "notosanssc", "sourcehansans", "wqy-", "droidsansfallback", "pingfang", "msyh", "simhei")
_CJK_FONTS += ("arialunicode",)
_OTHER_FONT = "dejavusans"
_FIRST_CJK = "\u2e80"
_FONT_DIRECTORIES = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "C:/Windows/Fonts"),
)


def draw(
    image: np.ndarray,
    boxes: np.ndarray,
    names: Sequence[str],
    scores: Sequence[float | None] | None = None,
    masks: Sequence[np.ndarray | dict[str, Any] | None] | None = None,
    colors: Sequence[Color] | None = None,
    keypoints: Sequence[np.ndarray | None] | None = None,
    limbs: Sequence[Sequence[int]] = (),
) -> np.ndarray:
    """A copy of the image with N objects drawn on it, the highest score on top; without scores the smallest.

    boxes: [N, 4] xyxy pixels. names: N, in any script; with neither name nor score an object has no label.
    masks: N, [H, W] bool or COCO RLEs, or None.
    colors: N; by default each name has its own, the same in every picture. keypoints: N, [K, 3] (x, y, score or
    visibility) or None; limbs: pairs of 0..K-1 that lines join.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    scores = [None] * len(boxes) if scores is None else scores
    masks = [None] * len(boxes) if masks is None else masks
    colors = [_color_of(name) for name in names] if colors is None else colors
    keypoints = [None] * len(boxes) if keypoints is None else keypoints
    if not len(boxes) == len(names) == len(scores) == len(masks) == len(colors) == len(keypoints):
        raise ValueError("draw: boxes, names, scores, masks, colors and keypoints must be equally many")
    canvas = np.array(image, dtype=np.uint8, order="C")
    line = max(1, round(min(canvas.shape[:2]) / 400))
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = sorted(range(len(boxes)), key=lambda i: (scores[i] or 0.0, -areas[i]))
    for i in order:
        if masks[i] is not None:
            _draw_mask(canvas, decode_rle(masks[i]) if isinstance(masks[i], dict) else masks[i], colors[i], line)
    for i in order:
        x1, y1, x2, y2 = (int(v) for v in np.rint(boxes[i]))
        cv2.rectangle(canvas, (x1, y1), (x2 - 1, y2 - 1), colors[i], line + 1)
    for i in order:
        if keypoints[i] is not None:
            _draw_skeleton(canvas, keypoints[i], limbs, colors[i], line)
    texts = [name if score is None else f"{name} {score:.2f}" for name, score in zip(names, scores)]
    return _draw_labels(canvas, boxes, texts, colors, order)


def draw_results(
    image: np.ndarray,
    results: list[dict[str, Any]],
    category_names: dict[int, str],
    threshold: float = 0.5,
    limbs: Sequence[Sequence[int]] | None = None,
) -> np.ndarray:
    """A copy of the image with COCO results drawn on it, or annotations, which have no score.

    results: with category_id, bbox xywh in pixels, and where they have them score, segmentation (polygons or RLE) and
    keypoints. category_names: category id -> name; a category's place in it decides the colour. threshold: least score
    drawn. limbs: pairs of keypoints 0..K-1 that lines join; None: keypoints are not drawn.
    """
    height, width = image.shape[:2]
    color_of = {category: PALETTE[i % len(PALETTE)] for i, category in enumerate(sorted(category_names))}
    shown = [result for result in results if result.get("score", 1.0) >= threshold]
    if unknown := {result["category_id"] for result in shown} - category_names.keys():
        raise DataError(
            f"results name category id {min(unknown)}, which has no name among the {len(category_names)} given"
        )
    boxes = np.array([result["bbox"] for result in shown], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return draw(
        image,
        boxes,
        [category_names[result["category_id"]] for result in shown],
        [result.get("score") for result in shown],
        [segmentation_to_rle(result.get("segmentation"), height, width) for result in shown],
        [color_of[result["category_id"]] for result in shown],
        None if limbs is None else [_points_of(result) for result in shown],
        limbs or (),
    )


def _points_of(result: dict[str, Any]) -> np.ndarray | None:
    points = result.get("keypoints")
    return np.array(points, dtype=np.float64).reshape(-1, 3) if points else None


def side_by_side(left: np.ndarray, right: np.ndarray, titles: tuple[str, str]) -> np.ndarray:
    """Two images next to each other on white, each under its title."""
    height = max(left.shape[0], right.shape[0])
    gap = max(4, height // 60)
    font = _font(_text_size(min(*left.shape[:2], *right.shape[:2])) * 5 // 4)
    strip = sum(font.getmetrics()) + gap
    canvas = Image.new("RGB", (left.shape[1] + gap + right.shape[1], strip + height), "white")
    pen = ImageDraw.Draw(canvas)
    for picture, title, x in ((left, titles[0], 0), (right, titles[1], left.shape[1] + gap)):
        pen.text((x + gap, gap // 2), _shorten(title, font, picture.shape[1] - 2 * gap), fill="black", font=font)
        canvas.paste(Image.fromarray(picture), (x, strip))
    return np.array(canvas)


def _color_of(name: str) -> Color:
    """The same in every process, which Python's own hash is not."""
    return PALETTE[zlib.crc32(name.encode(errors="replace")) % len(PALETTE)]


def _draw_mask(canvas: np.ndarray, mask: np.ndarray, color: Color, line: int) -> None:
    if mask.shape != canvas.shape[:2]:
        raise ValueError(f"draw: a mask of {mask.shape} does not fit an image of {canvas.shape[:2]}")
    mask = np.ascontiguousarray(mask, dtype=np.uint8)
    x, y, width, height = cv2.boundingRect(mask)
    inside = mask[y : y + height, x : x + width].astype(bool)
    region = canvas[y : y + height, x : x + width]
    region[inside] = (region[inside] * (1 - _MASK_OPACITY) + np.array(color) * _MASK_OPACITY).astype(np.uint8)
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    # A dark seam keeps neighbours of one class apart
    cv2.drawContours(canvas, contours, -1, tuple(channel // 3 for channel in color), line + 2, cv2.LINE_AA)
    cv2.drawContours(canvas, contours, -1, color, line, cv2.LINE_AA)


def _draw_skeleton(
    canvas: np.ndarray, points: np.ndarray, limbs: Sequence[Sequence[int]], color: Color, line: int
) -> None:
    """Limbs of which both ends were found, and over them the points, ringed to be seen on their object's mask."""
    shown = points[:, 2] > _LEAST_KEYPOINT_SCORE
    places = [(round(x), round(y)) for x, y in (points[:, :2] - 0.5).tolist()]
    for start, end in limbs:
        if shown[start] and shown[end]:
            cv2.line(canvas, places[start], places[end], color, line + 1, cv2.LINE_AA)
    dark = tuple(channel // 3 for channel in color)
    for place in (place for place, found in zip(places, shown) if found):
        cv2.circle(canvas, place, line + 3, dark, cv2.FILLED, cv2.LINE_AA)
        cv2.circle(canvas, place, line + 1, color, cv2.FILLED, cv2.LINE_AA)


def _draw_labels(
    canvas: np.ndarray, boxes: np.ndarray, texts: list[str], colors: Sequence[Color], order: list[int]
) -> np.ndarray:
    """Labels at their boxes, where possible not on one another. The topmost object chooses its place first. Objects
    without a text have none."""
    height, width = canvas.shape[:2]
    font = _font(_text_size(min(height, width)))
    if any(character >= _FIRST_CJK for text in texts for character in text):
        _warn_of_missing_font()
    pad = max(1, font.size // 5)
    label_height = sum(font.getmetrics()) + pad
    texts = [_shorten(text, font, width - 2 * pad) for text in texts]
    places: dict[int, Rect] = {}
    order = [i for i in order if texts[i]]
    for i in reversed(order):
        label_width = round(font.getlength(texts[i])) + 2 * pad
        places[i] = _free_place(boxes[i], (label_width, label_height), (width, height), list(places.values()))
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    for i in order:
        x, y, right, bottom = places[i]
        pen.rectangle((x, y, right - 1, bottom - 1), fill=colors[i])
        pen.text((x + pad, y + pad // 2), texts[i], fill=_ink(colors[i]), font=font)
    return np.array(picture)


def _free_place(box: np.ndarray, label: tuple[int, int], image: tuple[int, int], taken: list[Rect]) -> Rect:
    """x1, y1, x2, y2 of a label inside the image: above the box, in one of its corners, or below it; the first place
    that is free, or else the one that covers least of other labels. label, image: (width, height)."""
    x1, y1, x2, y2 = (round(float(v)) for v in box)
    above, bottom, right = y1 - label[1], y2 - label[1], x2 - label[0]
    places = []
    for x, y in (
        (x1, above),
        (x1, y1),
        (right, above),
        (right, y1),
        (x1, bottom),
        (right, bottom),
        (x1, y2),
        (right, y2),
    ):
        x, y = max(0, min(x, image[0] - label[0])), max(0, min(y, image[1] - label[1]))
        places.append((x, y, min(x + label[0], image[0]), min(y + label[1], image[1])))
    return min(places, key=lambda place: sum(_overlap(place, other) for other in taken))


def _overlap(a: Rect, b: Rect) -> int:
    """Pixels in both."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def _ink(background: Color) -> str:
    """Black or white, whichever reads better (luma of ITU-R BT.601)."""
    red, green, blue = background
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "white"


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text on one line, cut with an ellipsis where it is wider than `width` pixels."""
    text = "".join(character if character.isprintable() else " " for character in text)  # raqm fails on control ones
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _text_size(side: int) -> int:
    return max(10, round(side / 36))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    path = _font_file()
    return ImageFont.truetype(str(path), size) if path else ImageFont.load_default(size)


@functools.cache
def _font_file() -> Path | None:
    """The best font of the system; None where it has none of those known here: then Pillow's own serves."""
    found: dict[str, Path] = {}
    for directory in _FONT_DIRECTORIES:
        for path in sorted(Path(directory).expanduser().rglob("*")):
            if path.suffix.lower() in (".ttf", ".ttc", ".otf"):
                found.setdefault(path.stem.lower().replace(" ", ""), path)
    for wanted in (*_CJK_FONTS, _OTHER_FONT):
        names = [name for name in found if name.startswith(wanted)]
        if names:
            return found[min(names, key=lambda name: ("regular" not in name, len(name), name))]
    return None


@functools.cache
def _warn_of_missing_font() -> None:
    path = _font_file()
    if path is None or path.stem.lower().replace(" ", "").startswith(_OTHER_FONT):
        logger.warning(
            "no font with Chinese, Japanese and Korean characters was found: such names are drawn as empty boxes; "
            "install one, such as Noto Sans CJK"
        )
