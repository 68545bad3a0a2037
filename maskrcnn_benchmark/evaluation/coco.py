"""COCO's average precision and recall, from a ground truth file and a list of results.

The twelve numbers are those of pycocotools (Lin et al. 2014, Microsoft COCO; cocoeval.py). Two engines compute them:
hotcoco (Rust) and pycocotools itself. Both read what one preparation step has cleaned, so both avoid the same traps.
"""

from __future__ import annotations

import functools
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from ..data.coco import read_coco
from ..errors import ConfigError, DataError
from ..ops.masks import paste_masks_rle, sound_rle
from ..structures import Detections, ImageBatch

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm")
# Indices into COCOeval's axes: areas all, small (< 32^2 pixels), medium, large (> 96^2); IoU .5, .55, ... .95
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)
_IOU_50, _IOU_75 = 0, 5

# (ground truth, results, task, limits) -> precision [10, 101, K, 4, limits], recall [10, K, 4, limits] with -1 where
# there is no ground truth
Engine = Callable[[dict[str, list[dict]], "_Columns", str, list[int]], tuple[np.ndarray, np.ndarray]]


@dataclass
class _Columns:
    """N results as arrays. boxes [N, 4] float64 xywh; rles: compressed, for segm; areas [N] decide small and large."""

    image_ids: np.ndarray
    category_ids: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    rles: list[dict] | None


def evaluate(
    ground_truth: str | Path | dict[str, Any],
    results: list[dict[str, Any]],
    tasks: Sequence[str] = TASKS,
    evaluator: str = "hotcoco",
    image_ids: list[int] | None = None,
    max_detections: int = 100,
) -> dict[str, dict[str, Any]]:
    """COCO's twelve numbers for each task.

    ground_truth: a COCO instances file or its content. It is not changed, nor are the results.
    results: COCO results: image_id, category_id, score, and bbox [x, y, width, height] in pixels (for bbox) or
        segmentation, an RLE (for segm). A bbox takes no part in segm: there the mask's area says small or large.
    tasks: of "bbox" and "segm".
    evaluator: "hotcoco" or "pycocotools"; where hotcoco is not installed, pycocotools serves, with a warning.
    image_ids: the images that were looked at, each once; None for all. Others do not count.
    max_detections: the best so many of an image and class count.

    Returns for each task AP (mean over IoU .5:.05:.95), AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl as
    fractions in 0..1, and per_class (name -> AP); None where there is no ground truth to judge by. With another
    `max_detections` AR100 is named after it.

    Raises:
        DataError: ground truth or results that cannot be used; the message names the entry.
        ConfigError: unknown task or evaluator, max_detections below 1.
    """
    engine = _get_engine(evaluator)
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ConfigError(f"unknown evaluation task {unknown[0]!r}; known are {', '.join(TASKS)}")
    if max_detections < 1:
        raise ConfigError(f"max_detections is {max_detections}, but must be at least 1")
    limits = [limit for limit in (1, 10) if limit < max_detections] + [max_detections]
    images, categories, annotations = _read_ground_truth(ground_truth)
    chosen = _chosen_images(images, image_ids)
    scores = {}
    for task in tasks:
        columns = _read_results(results, task, images, categories, chosen)
        truth = {
            "images": [_image_entry(images[i]) for i in sorted(chosen)],
            "annotations": _clean(annotations, task, images, chosen),
            "categories": [{"id": i, "name": name} for i, name in categories.items()],
        }
        _warn_of_crowding(truth["annotations"], max_detections)
        try:
            precision, recall = engine(truth, columns, task, limits)
        except ValueError as error:  # hotcoco decodes every RLE, and says so when one is damaged
            raise DataError(f"{task} results cannot be evaluated: {error}") from error
        scores[task] = _summarize(precision, recall, limits, list(categories.values()))
    return scores


def load_results(path: str | Path) -> list[dict[str, Any]]:
    """A COCO results file: a list of objects. `evaluate` checks its entries.

    Raises:
        DataError: missing, not JSON, or not a list.
    """
    try:
        results = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"results file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"results file {path} is not valid JSON: {error}") from error
    if not isinstance(results, list):
        raise DataError(f"results file {path} must hold a list of results, not {_kind(results)}")
    for index, result in enumerate(results):
        if not isinstance(result, dict):
            raise DataError(f"results file {path}: entry {index} must be an object, not {_kind(result)}")
    return results


def detections_to_coco(
    detections: Detections, images: ImageBatch, category_ids: list[int], threshold: float = 0.5
) -> list[dict[str, Any]]:
    """A model's detections as COCO results in pixels of the original images. Waits for the device.

    category_ids: of label l the data set's id is `category_ids[l - 1]`. threshold: pixels whose probability is not
    below it belong to the mask. Boxes are scaled along each axis by itself, and clipped to the image. Masks become RLEs
    image by image, so that no batch of full-size masks is ever held.
    """
    results = []
    sizes = images.sizes.tolist()
    for i, (image_id, (height, width)) in enumerate(zip(images.image_ids, images.original_sizes)):
        valid = detections.valid[i].nonzero().squeeze(1)
        labels = detections.labels[i, valid].tolist()
        scores = detections.scores[i, valid].tolist()
        scale = torch.tensor([width / sizes[i][1], height / sizes[i][0]], dtype=torch.float64).repeat(2)
        boxes = detections.boxes[i, valid].cpu().double() * scale
        boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height] * 2, dtype=torch.float64))
        masks = None
        if detections.masks is not None:
            probabilities = detections.masks[i, valid]
            masks = paste_masks_rle(probabilities, boxes.float().to(probabilities.device), height, width, threshold)
        for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            result = {
                "image_id": image_id,
                "category_id": category_ids[labels[k] - 1],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": scores[k],
            }
            results.append(result | {"segmentation": masks[k]} if masks else result)
    return results


def format_table(scores: dict[str, Any]) -> str:
    """The main numbers of `evaluate`, one task a line; n/a for None. Keys that are no task are passed over."""
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    rows = [("task", *names)]
    for task in TASKS:
        if task in scores:
            values = [scores[task][name] for name in names]
            rows.append((task, *("n/a" if value is None else f"{value:.4f}" for value in values)))
    return "\n".join("  ".join([f"{row[0]:<4}", *(f"{cell:>6}" for cell in row[1:])]) for row in rows)


def segmentation_to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any] | None:
    """Any COCO segmentation as a compressed RLE {"size": [height, width], "counts": str}.

    Polygons [[x, y, x, y, ...], ...] (their union), RLE with a list of counts, or compressed. None when it is none of
    these, belongs to an image of another size, is damaged, or has no polygon of three points.
    """
    encoded = _encode(segmentation, height, width)
    return encoded[0] if encoded else None


# -------------------------------------------------------------------------------------------------- ground truth


def _read_ground_truth(
    ground_truth: str | Path | dict[str, Any],
) -> tuple[dict[int, dict], dict[int, str], list[dict[str, Any]]]:
    """Images by id, category names by id, annotations; all references checked."""
    is_file = isinstance(ground_truth, (str, Path))
    where = str(ground_truth) if is_file else "ground truth"
    content = read_coco(str(ground_truth)) if is_file else ground_truth
    try:
        images = {image["id"]: image for image in content["images"]}
        categories = {category["id"]: str(category["name"]) for category in content["categories"]}
        if not all(isinstance(i, (int, np.integer)) for i in (*images, *categories)):
            raise TypeError("ids must be whole numbers")
        annotations = content["annotations"]
        for number, annotation in enumerate(annotations):
            image_id, category_id = annotation["image_id"], annotation["category_id"]
            if image_id not in images or category_id not in categories:
                raise DataError(
                    f"{where}: annotations[{number}] names image id {image_id} and category id {category_id}: both "
                    "must be in its lists of images and categories"
                )
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{where} is not COCO ground truth: images and categories need an id, categories a name, annotations "
            f"an image_id and a category_id ({type(error).__name__}: {error})"
        ) from error
    # Exports exist that give a class and its parent the same name; both must stay apart in per_class
    often = {name for name, count in Counter(categories.values()).items() if count > 1}
    categories = {i: f"{name} ({i})" if name in often else name for i, name in sorted(categories.items())}
    return images, categories, annotations


def _chosen_images(images: dict[int, dict], image_ids: list[int] | None) -> set[int]:
    if image_ids is None:
        return set(images)
    if repeated := [i for i, count in Counter(image_ids).items() if count > 1]:
        raise DataError(f"images {_some(repeated)} were evaluated more than once: their results would count twice")
    if unknown := set(image_ids) - images.keys():
        raise DataError(f"evaluated images {_some(unknown)} are not in the ground truth")
    return set(image_ids)


def _clean(annotations: list[dict], task: str, images: dict[int, dict], chosen: set[int]) -> list[dict[str, Any]]:
    """New annotations with just the keys that evaluation reads, all present.

    Ids count from 1: COCOeval takes a match with annotation id 0 for no match.
    """
    cleaned, unusable, trimmed = [], [], []
    for annotation in annotations:
        image, name = images[annotation["image_id"]], annotation.get("id")
        if image["id"] not in chosen:
            continue
        try:
            box, area, segmentation = _shape(annotation, task, image)
        except (TypeError, ValueError) as error:
            raise DataError(f"ground truth: annotation id {name}: bad bbox, area or segmentation: {error}") from error
        if box is None or (task == "segm" and segmentation is None):
            unusable.append(name)
            continue
        polygons = annotation.get("segmentation")
        if isinstance(segmentation, list) and len(segmentation) < sum(isinstance(p, list) for p in polygons):
            trimmed.append(name)
        entry = {
            "id": len(cleaned) + 1,
            "image_id": image["id"],
            "category_id": annotation["category_id"],
            "bbox": box,
            "area": area,
            "iscrowd": int(bool(annotation.get("iscrowd", 0))),
        }
        cleaned.append(entry | {"segmentation": segmentation} if task == "segm" else entry)
    _warn_of_dropped(task, unusable, trimmed)
    return cleaned


def _warn_of_dropped(task: str, unusable: list[Any], trimmed: list[Any]) -> None:
    if unusable:
        problem = "no usable box" if task == "bbox" else "no usable mask of their image's size"
        logger.warning(
            "%s: %d annotations have %s and are dropped: ids %s", task, len(unusable), problem, _some(unusable)
        )
    if trimmed:
        problem = "polygons of fewer than 3 points, which are dropped"
        logger.warning("%s: %d annotations have %s: ids %s", task, len(trimmed), problem, _some(trimmed))


def _shape(
    annotation: dict[str, Any], task: str, image: dict[str, Any]
) -> tuple[list[float] | None, float, list | dict | None]:
    """Box [x, y, width, height] or None, area, and clean segmentation or None.

    What is missing is computed: the box from the segmentation, the area from the segmentation or else the box.
    """
    box, area, segmentation = annotation.get("bbox"), annotation.get("area"), annotation.get("segmentation")
    if segmentation and (task == "segm" or box is None or area is None):
        height, width = _size(image)
        segmentation = _clean_segmentation(segmentation, height, width)
        if area is None or isinstance(segmentation, dict):
            encoded = _encode(segmentation, height, width)
            segmentation = segmentation if encoded else None
            area = encoded[1] if encoded and area is None else area
        if segmentation is not None and box is None:
            box = _bounds(segmentation)
    if box is None or len(box) != 4 or not np.isfinite(box).all():
        return None, 0.0, None
    box = [float(v) for v in box]
    return box, box[2] * box[3] if area is None else float(area), segmentation or None


def _image_entry(image: dict[str, Any]) -> dict[str, int]:
    return {"id": int(image["id"]), "height": image.get("height", 0), "width": image.get("width", 0)}


def _size(image: dict[str, Any]) -> tuple[int, int]:
    try:
        return image["height"], image["width"]
    except KeyError as error:
        raise DataError(f"ground truth: image id {image['id']} has no {error}, which masks need") from error


def _clean_segmentation(segmentation: Any, height: int, width: int) -> list[list[float]] | dict[str, Any] | None:
    """Polygons of at least three points, or a compressed RLE of this size; None when nothing usable is left.

    A polygon of four numbers must go: pycocotools would take it for a box.
    """
    if isinstance(segmentation, list):
        if segmentation and isinstance(segmentation[0], (int, float)):
            segmentation = [segmentation]  # one polygon without the outer list
        return [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0 and np.isfinite(p).all()] or None
    sound = sound_rle(segmentation, height, width) if isinstance(segmentation, dict) else None
    return sound[0] if sound else None


def _encode(segmentation: Any, height: int, width: int) -> tuple[dict[str, Any], int] | None:
    """Compressed RLE and area of any COCO segmentation; None when it is not usable."""
    if isinstance(segmentation, dict):
        return sound_rle(segmentation, height, width)
    polygons = _clean_segmentation(segmentation, height, width)
    if polygons is None:
        return None
    rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    return {"size": [height, width], "counts": rle["counts"].decode()}, int(coco_mask.area(rle))


def _bounds(segmentation: list[list[float]] | dict[str, Any]) -> list[float]:
    """[x, y, width, height] around a clean segmentation."""
    if isinstance(segmentation, dict):
        return coco_mask.toBbox(segmentation).tolist()
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in segmentation])
    (x1, y1), (x2, y2) = points.min(axis=0), points.max(axis=0)
    return [x1, y1, x2 - x1, y2 - y1]


def _warn_of_crowding(annotations: list[dict], max_detections: int) -> None:
    """Where a class has more objects in an image than detections count, even perfect results stay below 1."""
    counts = Counter((a["image_id"], a["category_id"]) for a in annotations if not a["iscrowd"])
    crowded = sorted({image_id for (image_id, _), count in counts.items() if count > max_detections})
    if crowded:
        logger.warning(
            "%d images hold more than %d objects of a class, but no more detections count: AP cannot reach 1 (ids %s)",
            *(len(crowded), max_detections, _some(crowded)),
        )


# ------------------------------------------------------------------------------------------------------ results


def _read_results(
    results: list[dict], task: str, images: dict[int, dict], categories: dict[int, str], chosen: set[int]
) -> _Columns:
    """The results as arrays, checked; only those of the chosen images."""
    key = "bbox" if task == "bbox" else "segmentation"
    if not isinstance(results, list):
        raise DataError(f"results must be a list, not {_kind(results)}")
    try:
        image_ids = [result["image_id"] for result in results]
        category_ids = [result["category_id"] for result in results]
        shapes = [result[key] for result in results]
        scores = np.array([result["score"] for result in results], dtype=np.float64)
        boxes = np.array(shapes if task == "bbox" else [], dtype=np.float64).reshape(-1, 4)
        unknown_images, unknown_categories = set(image_ids) - images.keys(), set(category_ids) - categories.keys()
        if len(boxes) != (len(results) if task == "bbox" else 0) or scores.ndim != 1:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(_first_bad_result(results, key)) from error
    if unknown_images:
        raise DataError(f"results name images that are not in the ground truth: ids {_some(unknown_images)}")
    if unknown_categories:
        raise DataError(f"results name categories that are not in the ground truth: ids {_some(unknown_categories)}")
    finite = np.isfinite(scores) & (np.isfinite(boxes).all(axis=1) if task == "bbox" else True)
    if not finite.all():
        index = int(np.flatnonzero(~finite)[0])
        raise DataError(f"results[{index}] (image id {image_ids[index]}) has a score or bbox that is NaN or infinite")
    keep = [index for index, image_id in enumerate(image_ids) if image_id in chosen]
    rles, areas = None, boxes[:, 2] * boxes[:, 3]
    if task == "segm":
        encoded = [_encode_result(index, results[index], images) for index in keep]
        rles = [rle for rle, _ in encoded]
        areas = np.array([area for _, area in encoded], dtype=np.float64)
        boxes = np.zeros((len(results), 4))
    return _Columns(
        image_ids=np.array(image_ids, dtype=np.int64)[keep],
        category_ids=np.array(category_ids, dtype=np.int64)[keep],
        scores=scores[keep],
        boxes=boxes[keep],
        areas=areas if task == "segm" else areas[keep],
        rles=rles,
    )


def _first_bad_result(results: list[Any], key: str) -> str:
    """What is wrong with the first entry that cannot be read."""
    for index, result in enumerate(results):
        if not isinstance(result, dict):
            return f"results[{index}] must be an object, not {_kind(result)}"
        where = f"results[{index}] (image id {result.get('image_id')})"
        if missing := [name for name in ("image_id", "category_id", "score", key) if name not in result]:
            return f"{where} has no {', '.join(missing)}"
        if not isinstance(result["score"], (int, float, np.number)):
            return f"{where}: score must be a number, not {result['score']!r}"
        box = result[key]
        if key == "bbox" and (np.shape(box) != (4,) or not all(isinstance(v, (int, float, np.number)) for v in box)):
            return f"{where}: bbox must be [x, y, width, height], not {box!r}"
    return "results: an image_id or category_id is not a whole number"


def _encode_result(index: int, result: dict[str, Any], images: dict[int, dict]) -> tuple[dict[str, Any], int]:
    image_id = result["image_id"]
    height, width = _size(images[image_id])
    try:
        encoded = _encode(result["segmentation"], height, width)
    except (TypeError, ValueError):
        encoded = None
    if encoded is None:
        raise DataError(
            f"results[{index}] (image id {image_id}): its segmentation is no RLE of a mask {height} pixels high and "
            f"{width} wide"
        )
    return encoded


# ------------------------------------------------------------------------------------------------------ engines


@functools.cache
def _get_engine(name: str) -> Engine:
    if name not in ("hotcoco", "pycocotools"):
        raise ConfigError(f"unknown evaluator {name!r}; known are hotcoco, pycocotools (TEST.EVALUATOR)")
    if name == "hotcoco":
        try:
            import hotcoco  # noqa: F401  (where no wheel fits, evaluation is slower, not impossible)
        except ImportError:
            logger.warning("hotcoco is not installed (pip install hotcoco): pycocotools evaluates, many times slower")
        else:
            return _run_hotcoco
    return _run_pycocotools


def _run_hotcoco(truth: dict, columns: _Columns, task: str, limits: list[int]) -> tuple[np.ndarray, np.ndarray]:
    from hotcoco import COCO, COCOeval

    coco = COCO(truth)
    table = np.column_stack([columns.image_ids, columns.boxes, columns.scores, columns.category_ids])
    detections = coco.load_res(table, segmentation=columns.rles)
    # load_res takes the area from the box columns, for masks too
    detections.update_anns(ids=np.arange(1, len(table) + 1), area=columns.areas)
    evaluation = COCOeval(coco, detections, task)
    evaluation.params.max_dets = limits
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _run_pycocotools(truth: dict, columns: _Columns, task: str, limits: list[int]) -> tuple[np.ndarray, np.ndarray]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = ("image_id", "category_id", "score", "bbox", "area")
    arrays = (columns.image_ids, columns.category_ids, columns.scores, columns.boxes, columns.areas)
    results = [dict(zip(names, row)) for row in zip(*(array.tolist() for array in arrays))]
    for index, result in enumerate(results):
        result |= {"id": index + 1, "iscrowd": 0}
        if columns.rles is not None:
            result["segmentation"] = columns.rles[index]
    with redirect_stdout(io.StringIO()):
        coco, detections = COCO(), COCO()
        coco.dataset, detections.dataset = truth, {**truth, "annotations": results}
        coco.createIndex()
        detections.createIndex()
        evaluation = COCOeval(coco, detections, task)
        evaluation.params.maxDets = limits
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _summarize(precision: np.ndarray, recall: np.ndarray, limits: list[int], names: list[str]) -> dict[str, Any]:
    """The twelve numbers, precision always at the last limit: COCOeval.summarize looks for 100, and else says -1."""
    at_limit = precision[..., -1]
    scores: dict[str, Any] = {
        "AP": _mean(at_limit[..., _ALL]),
        "AP50": _mean(at_limit[_IOU_50, ..., _ALL]),
        "AP75": _mean(at_limit[_IOU_75, ..., _ALL]),
        "APs": _mean(at_limit[..., _SMALL]),
        "APm": _mean(at_limit[..., _MEDIUM]),
        "APl": _mean(at_limit[..., _LARGE]),
    }
    scores |= {f"AR{limit}": _mean(recall[..., _ALL, i]) for i, limit in enumerate(limits)}
    scores |= {
        "ARs": _mean(recall[..., _SMALL, -1]),
        "ARm": _mean(recall[..., _MEDIUM, -1]),
        "ARl": _mean(recall[..., _LARGE, -1]),
    }
    scores["per_class"] = {name: _mean(at_limit[:, :, k, _ALL]) for k, name in enumerate(names)}
    return scores


def _mean(values: np.ndarray) -> float | None:
    applicable = values[values > -1]
    return float(applicable.mean()) if applicable.size else None


def _some(ids: Iterable[Any]) -> str:
    ids = [str(i) for i in ids]
    return ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(type(value), repr(value)[:40])
