"""A data set to look at: its images with their annotations drawn on them, as one PNG or as a page.

The page is one file without scripts or pictures from elsewhere; a picture is a click away from its full size.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import cv2
import numpy as np

from .visualize import draw_results

# Longest side of a picture on the page, in pixels, and of a cell of the sheet
PAGE_SIDE, CELL = 800, 320
_GAP = 8
_STYLE = """
:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;margin:1.5rem;max-width:90rem}
table{border-collapse:collapse}td,th{padding:.1rem .8rem .1rem 0;text-align:left}td.n{text-align:right}
.all{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem}figure{margin:0}
summary{list-style:none;cursor:zoom-in}summary::-webkit-details-marker{display:none}
img{max-width:100%;display:block}figcaption{font-size:.85rem;overflow-wrap:anywhere}
details[open]{grid-column:1/-1}
"""


@dataclass(frozen=True)
class Picture:
    """image: [H, W, 3] uint8 RGB with its annotations drawn; title: its file's name; objects: class -> how many."""

    image: np.ndarray
    title: str
    image_id: int
    objects: Counter[str]


def pictures(dataset: Any, indices: Iterable[int], side: int) -> Iterator[Picture]:
    """Of a data set's images at these indices, drawn at a longest side of at most `side` pixels. Raises DataError."""
    names = dict(zip(dataset.category_ids, dataset.category_names))
    for index in indices:
        sample, annotations = dataset.load(index), dataset.annotations(index)
        drawn = draw_results(sample.image, annotations, names)
        counts = Counter(names[a["category_id"]] + (" (crowd)" if a["iscrowd"] else "") for a in annotations)
        yield Picture(shrink(drawn, side), dataset.file_names[index], sample.image_id, counts)


def sheet(shown: Iterable[Picture], columns: int = 4) -> np.ndarray:
    """[H, W, 3] uint8 RGB: the pictures in rows of `columns`, each in a square cell."""
    cells = [_cell(picture.image) for picture in shown]
    columns = min(columns, len(cells))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    return np.concatenate(rows)


def page(title: str, shown: Iterable[Picture], dataset: Any) -> str:
    """HTML with the classes of the data set and the pictures."""
    figures, counts = [], Counter()
    for picture in shown:
        counts += picture.objects
        listed = ", ".join(f"{escape(name)} {count}" for name, count in sorted(picture.objects.items()))
        name = f"{escape(picture.title)} (id {picture.image_id})"
        figures.append(
            f'<details><summary><figure><img alt="{name}" src="{inline(picture.image)}">'
            f"<figcaption>{name}: {listed or 'no objects'}</figcaption></figure></summary></details>"
        )
    rows = "".join(
        f'<tr><td class="n">{i}</td><td>{escape(name)}</td><td class="n">{counts[name]}</td></tr>'
        for i, name in zip(dataset.category_ids, dataset.category_names)
    )
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><p>{len(figures)} of {len(dataset)} images;"
        f" {int(dataset.counts.sum())} objects in all.</p>"
        f"<table><tr><th>id</th><th>class</th><th>objects shown</th></tr>{rows}</table>"
        f'<div class="all">{"".join(figures)}</div></body></html>\n'
    )


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """The image, or a smaller one whose longest side is `side` pixels."""
    height, width = image.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image


def _cell(image: np.ndarray) -> np.ndarray:
    image = shrink(image, CELL)
    cell = np.full((CELL + _GAP, CELL + _GAP, 3), 255, np.uint8)
    y, x = (CELL + _GAP - image.shape[0]) // 2, (CELL + _GAP - image.shape[1]) // 2
    cell[y : y + image.shape[0], x : x + image.shape[1]] = image
    return cell


def inline(image: np.ndarray) -> str:
    """A picture as the address of an <img>, content and all."""
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
