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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from ..data.coco import drawable, read_coco
from ..errors import ConfigError, DataError
from ..ops.rle import rle_areas, sound_rle
from .results import Results

logger = logging.getLogger(__name__)

# Task -> the key of its results
TASKS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
# Object sizes as COCOeval counts them: small below 32^2 pixels, large above 96^2; keypoints have no small ones
_SIZES = {"bbox": "asml", "segm": "asml", "keypoints": "aml"}
# Indices into COCOeval's axis of IoU (for keypoints OKS) .5, .55, ... .95
_IOU_50, _IOU_75 = 0, 5
# COCO's limit for keypoints
_MOST_POSES = 20
# Spread of human annotators at COCO's 17 keypoints of a person (cocoeval.py)
_COCO_SIGMAS = [0.26, 0.25, 0.25, 0.35, 0.35, 0.79, 0.79, 0.72, 0.72, 0.62, 0.62, 1.07, 1.07, 0.87, 0.87, 0.89, 0.89]

Truth = dict[str, list[dict]]


@dataclass
class Curves:
    """COCOeval's arrays, -1 where there is no ground truth: IoU x recall 0, .01, ... 1 x class x object size x limit.

    precision [10, 101, K, sizes, limits], recall [10, K, sizes, limits]; names: the K classes.
    """

    precision: np.ndarray
    recall: np.ndarray
    names: list[str]


# (ground truth, results whose boxes and areas are the task's, task, limits, OKS sigmas) -> precision, recall
Engine = Callable[[Truth, Results, str, list[int], list[float] | None], tuple[np.ndarray, np.ndarray]]


def evaluate(
    ground_truth: str | Path | dict[str, Any] | GroundTruth,
    results: list[dict[str, Any]] | Results,
    tasks: Sequence[str] = ("bbox", "segm"),
    evaluator: str = "hotcoco",
    image_ids: list[int] | None = None,
    max_detections: int = 100,
    keypoint_sigmas: Sequence[float] = (),
) -> dict[str, dict[str, Any]]:
    """COCO's numbers for each task; see `evaluate_with_curves`, whose curves are left away."""
    arguments = (ground_truth, results, tasks, evaluator, image_ids, max_detections, keypoint_sigmas)
    return evaluate_with_curves(*arguments)[0]


def evaluate_with_curves(
    ground_truth: str | Path | dict[str, Any] | GroundTruth,
    results: list[dict[str, Any]] | Results,
    tasks: Sequence[str] = ("bbox", "segm"),
    evaluator: str = "hotcoco",
    image_ids: list[int] | None = None,
    max_detections: int = 100,
    keypoint_sigmas: Sequence[float] = (),
) -> tuple[dict[str, dict[str, Any]], dict[str, Curves]]:
    """COCO's numbers for each task, and the curves that they summarize.

    ground_truth: a COCO instances file or its content. It is not changed, nor are the results.
    results: COCO results: image_id, category_id, score, and bbox [x, y, width, height] in pixels (for bbox),
        segmentation, an RLE (for segm), or keypoints [x, y, v, x, y, v, ...]. A bbox takes no part in segm: there the
        mask's area says small or large.
    tasks: of "bbox", "segm" and "keypoints".
    evaluator: "hotcoco" or "pycocotools"; where hotcoco is not installed, pycocotools serves, with a warning.
    image_ids: the images that were looked at, each once; None for all. Others do not count.
    max_detections: the best so many of an image and class count; for keypoints COCO counts 20.
    keypoint_sigmas: one a keypoint; COCO's own when there are 17 keypoints and none are given.

    Returns for each task AP (mean over IoU .5:.05:.95), AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl as
    fractions in 0..1 (keypoints: AP, AP50, AP75, APm, APl, AR20, ARm, ARl over OKS), and per_class (name -> AP); None
    where there is no ground truth to judge by. With another `max_detections` AR100 is named after it.

    Raises:
        DataError: ground truth or results that cannot be used; the message names the entry.
        ConfigError: unknown task or evaluator, max_detections below 1, sigmas that do not fit the keypoints.
    """
    engine = _get_engine(evaluator)
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ConfigError(f"unknown evaluation task {unknown[0]!r}; known are {', '.join(TASKS)}")
    if max_detections < 1:
        raise ConfigError(f"max_detections is {max_detections}, but must be at least 1")
    truth, results = prepare(ground_truth, results, tasks, image_ids)
    scores, curves = {}, {}
    for task in tasks:
        most = _MOST_POSES if task == "keypoints" else max_detections
        limits = [limit for limit in (1, 10) if limit < most and task != "keypoints"] + [most]
        cleaned = {
            "images": [_image_entry(image) for image in truth.images.values()],
            "annotations": clean_annotations(truth, task),
            "categories": [{"id": i, "name": name} for i, name in truth.categories.items()],
        }
        _warn_of_crowding(cleaned["annotations"], most)
        sigmas = _sigmas(cleaned, results, keypoint_sigmas) if task == "keypoints" else None
        try:
            precision, recall = engine(cleaned, _of_task(results, task), task, limits, sigmas)
        except ValueError as error:  # hotcoco decodes every RLE, and says so when one is damaged
            raise DataError(f"{task} results cannot be evaluated: {error}") from error
        curves[task] = Curves(precision, recall, list(truth.categories.values()))
        scores[task] = _summarize(curves[task], limits, _SIZES[task])
    return scores, curves


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


def format_table(scores: dict[str, Any]) -> str:
    """The main numbers of each task and further metric, one a line; n/a for None. Other keys are passed over."""
    if "box_proposal" in scores:
        shown = {name: "n/a" if value is None else f"{value:.4f}" for name, value in scores["box_proposal"].items()}
        return "\n".join(f"box_proposal  {name:<9} {value}" for name, value in shown.items())
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    rows = [("task", *names)]
    for task in (*TASKS, "voc07", "voc", "cityscapes"):
        if task in scores:
            values = [scores[task].get(name) for name in names]
            rows.append((task, *("n/a" if value is None else f"{value:.4f}" for value in values)))
    wide = max(len(row[0]) for row in rows)
    return "\n".join("  ".join([f"{row[0]:<{wide}}", *(f"{cell:>6}" for cell in row[1:])]) for row in rows)


def segmentation_to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any] | None:
    """Any COCO segmentation as a compressed RLE {"size": [height, width], "counts": str}.

    Polygons [[x, y, x, y, ...], ...] (their union), RLE with a list of counts, or compressed. None when it is none of
    these, belongs to an image of another size, is damaged, or has no polygon of three points.
    """
    encoded = _encode(segmentation, height, width)
    return encoded[0] if encoded else None


# -------------------------------------------------------------------------------------------------- ground truth


@dataclass
class GroundTruth:
    """What results are judged by. images: by id, those that were looked at; categories: id -> name, by rising id;
    annotations: of these images, as the file has them."""

    images: dict[int, dict]
    categories: dict[int, str]
    annotations: list[dict[str, Any]]

    @property
    def sizes(self) -> dict[int, tuple[int, int]]:
        """(height, width) by image id. Raises DataError where the file does not say."""
        return {i: _size(image) for i, image in self.images.items()}


def prepare(
    ground_truth: str | Path | dict[str, Any] | GroundTruth,
    results: list[dict[str, Any]] | Results,
    tasks: Iterable[str],
    image_ids: list[int] | None = None,
) -> tuple[GroundTruth, Results]:
    """Ground truth and results of the chosen images, checked: what `evaluate` and every other metric judges.

    Raises:
        DataError: as `evaluate`.
    """
    if isinstance(ground_truth, GroundTruth):
        return ground_truth, results
    images, categories, annotations = _read_ground_truth(ground_truth)
    chosen = _chosen_images(images, image_ids)
    results = _read_results(results, tasks, images, categories, chosen)
    annotations = [a for a in annotations if a["image_id"] in chosen]
    return GroundTruth({i: images[i] for i in sorted(chosen)}, categories, annotations), results


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


def clean_annotations(truth: GroundTruth, task: str) -> list[dict[str, Any]]:
    """New annotations with just the keys that evaluation reads, all present.

    Ids count from 1: COCOeval takes a match with annotation id 0 for no match.
    """
    cleaned, unusable, trimmed = [], [], []
    for annotation in truth.annotations:
        image, name = truth.images[annotation["image_id"]], annotation.get("id")
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
        if annotation.get("difficult"):  # VOC's
            entry["difficult"] = 1
        if task == "segm":
            entry["segmentation"] = segmentation
        elif task == "keypoints":
            entry |= _keypoints(annotation)
        cleaned.append(entry)
    _warn_of_dropped(task, unusable, trimmed)
    return cleaned


def _keypoints(annotation: dict[str, Any]) -> dict[str, Any]:
    """keypoints and num_keypoints of an annotation; one without any visible is not looked for."""
    points = annotation.get("keypoints") or []
    if len(points) % 3 or not all(isinstance(v, (int, float)) for v in points):
        raise DataError(
            f"ground truth: annotation id {annotation.get('id')}: keypoints must be [x, y, v, x, y, v, ...]"
        )
    return {"keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3])}


def _sigmas(truth: Truth, results: Results, given: Sequence[float]) -> list[float]:
    """The OKS sigma of each keypoint; checks that all objects have equally many. Fills in those that have none."""
    counts = {len(entry["keypoints"]) // 3 for entry in truth["annotations"] if entry["keypoints"]}
    if len(results):
        counts.add(results.keypoints.shape[1])
    if len(counts) > 1:
        raise DataError(
            f"ground truth and results have objects of {sorted(counts)} keypoints; they must be equally many"
        )
    count = counts.pop() if counts else len(_COCO_SIGMAS)
    sigmas = list(given) or [sigma / 10 for sigma in _COCO_SIGMAS]
    if len(sigmas) != count:
        raise ConfigError(
            f"there are {len(sigmas)} OKS sigmas for {count} keypoints: give `keypoint_sigmas`, {count} numbers"
        )
    for entry in truth["annotations"]:
        entry["keypoints"] = entry["keypoints"] or [0] * (3 * count)
    return sigmas


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
        return [p for p in segmentation if np.isfinite(p).all() and drawable(p)] or None
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
    results: list[dict] | Results,
    tasks: Iterable[str],
    images: dict[int, dict],
    categories: dict[int, str],
    chosen: set,
) -> Results:
    """The results of the chosen images as arrays, with what the tasks need, checked.

    Raises:
        DataError: what is wrong, and in which entry.
    """
    if not isinstance(results, Results):
        results = _from_list(results, tasks)
    _check_ids("images", results.image_ids, images)
    _check_ids("categories", results.category_ids, categories)
    for task, values in (("bbox", results.boxes), ("keypoints", results.keypoints)):
        finite = np.isfinite(results.scores)
        if values is not None and task in tasks:
            finite = finite & np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        if not finite.all():
            index = int(np.flatnonzero(~finite)[0])
            where = f"results[{index}] (image id {results.image_ids[index]})"
            raise DataError(f"{where} has a score, bbox or keypoint that is NaN or infinite")
    if len(chosen) < len(images):
        results = results.select(np.flatnonzero(np.isin(results.image_ids, list(chosen))))
    if "segm" in tasks and results.areas is None:
        _measure_masks(results, images)
    return results


def _check_ids(kind: str, ids: np.ndarray, known: dict[int, Any]) -> None:
    unknown = set(np.unique(ids).tolist()) - known.keys()
    if unknown:
        raise DataError(f"results name {kind} that are not in the ground truth: ids {_some(sorted(unknown))}")


def _from_list(results: list[dict], tasks: Iterable[str]) -> Results:
    """COCO's results format as arrays; masks as they are, not looked at."""
    if not isinstance(results, list):
        raise DataError(f"results must be a list, not {_kind(results)}")
    keys = [TASKS[task] for task in tasks]
    try:
        columns = {key: [result[key] for result in results] for key in ("image_id", "category_id", "score", *keys)}
        ids = [np.array(columns[key]) for key in ("image_id", "category_id")]
        scores = np.array(columns["score"], dtype=np.float64)
        boxes = np.array(columns["bbox"], dtype=np.float64).reshape(-1, 4) if "bbox" in keys else None
        points = None
        if "keypoints" in keys:
            count = len(results[0]["keypoints"]) // 3 if results else 1
            points = np.array(columns["keypoints"], dtype=np.float64).reshape(len(results), count, 3)
        whole = all(values.dtype.kind in "iu" or not len(results) for values in ids)
        if scores.ndim != 1 or not whole or (boxes is not None and len(boxes) != len(results)):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(_first_bad_result(results, keys)) from error
    ids = [values.astype(np.int64) for values in ids]
    return Results(*ids, scores, boxes, masks=columns.get("segmentation"), keypoints=points)


def _measure_masks(results: Results, images: dict[int, dict]) -> None:
    """Fills in sizes and areas. Masks of any form that COCO knows become compressed RLEs.

    Raises DataError for the first that is damaged or of another size.
    """
    size_of = {i: _size(images[i]) for i in np.unique(results.image_ids).tolist()}
    results.sizes = np.array([size_of[i] for i in results.image_ids.tolist()], np.int64).reshape(-1, 2)
    texts = []
    for index, (mask, (height, width)) in enumerate(zip(results.masks, results.sizes.tolist())):
        plain = isinstance(mask, dict) and isinstance(mask.get("counts"), str) and mask.get("size") == [height, width]
        if not plain:
            mask = _encode_result(index, results, height, width)
        texts.append(mask["counts"])
    areas = rle_areas(texts, results.sizes.prod(axis=1))
    if (areas < 0).any():
        index = int(np.flatnonzero(areas < 0)[0])
        raise DataError(_bad_mask(index, results, *results.sizes[index].tolist()))
    results.masks, results.areas = texts, areas.astype(np.float64)


def _of_task(results: Results, task: str) -> Results:
    """With the boxes and areas that COCOeval's results have in this task: they decide small and large."""
    if task == "bbox":
        return replace(results, areas=results.boxes[:, 2] * results.boxes[:, 3], masks=None)
    if task == "segm":
        return replace(results, boxes=np.zeros((len(results), 4)))
    points = results.keypoints[..., :2]
    low, high = points.min(axis=1), points.max(axis=1)
    boxes = np.concatenate([low, high - low], axis=1)
    return replace(results, boxes=boxes, areas=boxes[:, 2] * boxes[:, 3], masks=None)


def _first_bad_result(results: list[Any], keys: list[str]) -> str:
    """What is wrong with the first entry that cannot be read."""
    for index, result in enumerate(results):
        if not isinstance(result, dict):
            return f"results[{index}] must be an object, not {_kind(result)}"
        where = f"results[{index}] (image id {result.get('image_id')})"
        if missing := [name for name in ("image_id", "category_id", "score", *keys) if name not in result]:
            return f"{where} has no {', '.join(missing)}"
        if not isinstance(result["score"], (int, float, np.number)):
            return f"{where}: score must be a number, not {result['score']!r}"
        for key in ("image_id", "category_id"):
            if not isinstance(result[key], (int, np.integer)):
                return f"{where}: {key} must be a whole number, not {result[key]!r}"
        if "bbox" in keys and not _are_numbers(result["bbox"], 4):
            return f"{where}: bbox must be [x, y, width, height], not {result['bbox']!r}"
        if "keypoints" in keys and not _are_numbers(result["keypoints"], len(results[0]["keypoints"])):
            return f"{where}: keypoints must be [x, y, v, x, y, v, ...], equally many in all results"
    return "results: keypoints must be [x, y, v, x, y, v, ...]"


def _are_numbers(values: Any, count: int) -> bool:
    return np.shape(values) == (count,) and all(isinstance(v, (int, float, np.number)) for v in values)


def _encode_result(index: int, results: Results, height: int, width: int) -> dict[str, Any]:
    try:
        encoded = _encode(results.masks[index], height, width)
    except (TypeError, ValueError):
        encoded = None
    if encoded is None:
        raise DataError(_bad_mask(index, results, height, width))
    return encoded[0]


def _bad_mask(index: int, results: Results, height: int, width: int) -> str:
    where = f"results[{index}] (image id {results.image_ids[index]})"
    return f"{where}: its segmentation is no RLE of a mask {height} pixels high and {width} wide"


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


def _run_hotcoco(
    truth: Truth, results: Results, task: str, limits: list[int], sigmas: list[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    from hotcoco import COCO, COCOeval

    coco = COCO(truth)
    if task == "keypoints":
        detections = coco.load_res(_with_ids(results)) if len(results) else coco.load_res(np.zeros((0, 7)))
    else:
        table = np.column_stack([results.image_ids, results.boxes, results.scores, results.category_ids])
        detections = coco.load_res(table, segmentation=results.rles() if task == "segm" else None)
    # load_res takes the area from the box columns, for masks too
    detections.update_anns(ids=np.arange(1, len(results) + 1), area=results.areas)
    evaluation = COCOeval(coco, detections, task)
    evaluation.params.max_dets = limits
    if sigmas:
        evaluation.params.kpt_oks_sigmas = sigmas
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _run_pycocotools(
    truth: Truth, results: Results, task: str, limits: list[int], sigmas: list[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(io.StringIO()):
        coco, detections = COCO(), COCO()
        coco.dataset, detections.dataset = truth, {**truth, "annotations": _with_ids(results)}
        coco.createIndex()
        detections.createIndex()
        evaluation = COCOeval(coco, detections, task)
        evaluation.params.maxDets = limits
        if sigmas:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _with_ids(results: Results) -> list[dict[str, Any]]:
    """Annotations as pycocotools' loadRes makes them; ids count from 1."""
    entries = results.to_list()
    for index, (entry, area) in enumerate(zip(entries, results.areas.tolist()), start=1):
        entry |= {"id": index, "iscrowd": 0, "area": area}
    return entries


def _summarize(curves: Curves, limits: list[int], sizes: str) -> dict[str, Any]:
    """The numbers of COCOeval.summarize, precision at the last limit: summarize itself looks for 100, else says -1."""
    precision, recall = curves.precision[..., -1], curves.recall
    scores: dict[str, Any] = {
        "AP": _mean(precision[..., 0]),
        "AP50": _mean(precision[_IOU_50, ..., 0]),
        "AP75": _mean(precision[_IOU_75, ..., 0]),
    }
    scores |= {f"AP{size}": _mean(precision[..., i]) for i, size in enumerate(sizes) if i}
    scores |= {f"AR{limit}": _mean(recall[..., 0, i]) for i, limit in enumerate(limits)}
    scores |= {f"AR{size}": _mean(recall[..., i, -1]) for i, size in enumerate(sizes) if i}
    scores["per_class"] = {name: _mean(precision[:, :, k, 0]) for k, name in enumerate(curves.names)}
    return scores


def of_classes(curves: Curves) -> list[tuple[str, dict[str, float | None]]]:
    """Each class's AP, AP50, AP75 and AR; None without objects."""
    precision, recall = curves.precision[..., 0, -1], curves.recall[..., 0, -1]
    return [
        (
            name,
            {
                "AP": _mean(precision[:, :, k]),
                "AP50": _mean(precision[_IOU_50, :, k]),
                "AP75": _mean(precision[_IOU_75, :, k]),
                "AR": _mean(recall[:, k]),
            },
        )
        for k, name in enumerate(curves.names)
    ]


def _mean(values: np.ndarray) -> float | None:
    applicable = values[values > -1]
    return float(applicable.mean()) if applicable.size else None


def _some(ids: Iterable[Any]) -> str:
    ids = [str(i) for i in ids]
    return ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(type(value), repr(value)[:40])
