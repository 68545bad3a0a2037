"""All that is said about the accuracy of one data set's results: COCO's numbers, further metrics, and what a report
draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from . import cityscapes, proposals, voc
from .coco import Curves, clean_annotations, evaluate_with_curves, of_classes, prepare
from .confusion import confusion
from .results import Results

# TEST.METRICS: what each reads of the results
METRICS = {"coco": "", "voc07": "bbox", "voc": "bbox", "cityscapes": "segm"}
_DECIMALS = 4


def score(
    ground_truth: str | Path | dict[str, Any],
    results: list[dict[str, Any]] | Results,
    tasks: Sequence[str],
    metrics: Sequence[str] = ("coco",),
    evaluator: str = "hotcoco",
    image_ids: list[int] | None = None,
    keypoint_sigmas: Sequence[float] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores, as `coco.evaluate` gives them and those of further METRICS under their names; and details for a report.

    The task "box_proposal", which stands alone, has average recall instead (proposals.py), and no details.

    details: task -> {"classes": {name: {"AP", "AP50", "AP75", "AR", "objects"}}, "curves": {"mean"|"AP50"|"AP75":
    precision at recall 0, .01, ... 1}}, and with boxes "confusion": {"names", "matrix"} and
    "images": [[image id, objects, detections, right ones], ...] (confusion.py).

    Raises:
        ConfigError: an unknown metric, or one that reads what the tasks do not give.
    """
    for name in metrics:
        if METRICS.get(name) is None:
            raise ConfigError(f"unknown metric {name!r}; known are {', '.join(METRICS)} (TEST.METRICS)")
        if METRICS[name] and METRICS[name] not in tasks:
            raise ConfigError(f"TEST.METRICS: {name} judges {METRICS[name]} results, which the model does not give")
    if "box_proposal" in tasks:
        truth, results = prepare(ground_truth, results, ("bbox",), image_ids)
        return {"box_proposal": proposals.average_recall(clean_annotations(truth, "bbox"), results)}, {}
    truth, results = prepare(ground_truth, results, tasks, image_ids)
    scores, curves = evaluate_with_curves(truth, results, tasks, evaluator, keypoint_sigmas=keypoint_sigmas)
    annotations = {METRICS[name]: clean_annotations(truth, METRICS[name]) for name in metrics if METRICS[name]}
    if "bbox" in tasks and "bbox" not in annotations:
        annotations["bbox"] = clean_annotations(truth, "bbox")
    names = truth.categories
    for name in metrics:
        if name in ("voc07", "voc"):
            scores[name] = voc.average_precision(annotations["bbox"], results, names, name == "voc07")
        elif name == "cityscapes":
            scores[name] = cityscapes.average_precision(annotations["segm"], results, names, truth.sizes)
    counts = Counter(a["category_id"] for a in truth.annotations if not a.get("iscrowd", 0))
    objects = [counts[category] for category in names]
    details: dict[str, Any] = {task: _details(curve, objects) for task, curve in curves.items()}
    if "bbox" in tasks:
        counted = confusion(annotations["bbox"], results, list(names))
        details["confusion"] = {"names": list(names.values()), "matrix": counted.matrix.tolist()}
        details["images"] = [[image, *counts] for image, counts in sorted(counted.images.items())]
    return scores, details


def _details(curves: Curves, objects: list[int]) -> dict[str, Any]:
    precision = curves.precision[..., 0, -1]
    judged = precision[..., (precision > -1).all(axis=(0, 1))]
    mean = judged.mean(axis=2) if judged.size else np.zeros(precision.shape[:2])
    picked = {"mean": mean.mean(axis=0), "AP50": mean[0], "AP75": mean[5]}
    return {
        "classes": {name: numbers | {"objects": count} for (name, numbers), count in zip(of_classes(curves), objects)},
        "curves": {name: np.round(curve, _DECIMALS).tolist() for name, curve in picked.items()},
    }
