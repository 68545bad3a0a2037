"""configs/README.md: every model's size, arithmetic, and what others published for the recipe."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from yacs.config import CfgNode

from ..config import flat, get_config
from ..device import Device
from ..models.build import build_model
from .flops import inference_flops

# Padded (height, width) and detections of an image that GFLOPs are counted for
SIZE = (800, 1344)
DETECTIONS = 100
BEGIN, END = "<!-- table: python tools/zoo.py -->", "<!-- end of the table -->"
ROOT = Path(__file__).resolve().parents[2]
# Times of a machine: {recipe: {"ms", "memory_mb", "commit"}}, by `python tools/zoo.py --measure`
MEASURED = ROOT / "docs" / "measurements" / "zoo_cpu_amd_epyc_2_cores.json"
# Keys of MODEL that change nothing in inference
TRAINING = re.compile(
    r"MODEL\.(WEIGHT|BACKBONE\.FREEZE_CONV_BODY_AT|.*("
    r"_TRAIN|_PER_IMAGE|_FRACTION|_IOU_THRESHOLD|LOSS.*|BETA|STRADDLE_THRESH|PER_BATCH|PRIOR_PROB|POSITIVES))$"
)
# Seconds after which a model's measurement is given up, and after which no further one begins
LIMIT, BUDGET = 90, 13 * 60
# Directories of configs/ that hold no models of their own
PARTS = {"_base_", "benchmark", "conventions"}


class Published(NamedTuple):
    """AP in hundredths of boxes, and of masks or keypoints, and who says so."""

    box: float
    shape: float | None
    source: str


_ZOO = "maskrcnn-benchmark's MODEL_ZOO.md"
_DCN = "maskrcnn-benchmark's configs/dcn"
_DETECTRON = "Detectron, by maskrcnn-benchmark's MODEL_ZOO.md"
PUBLISHED = {
    "e2e_faster_rcnn_R_50_C4_1x": Published(34.8, None, _ZOO),
    "e2e_faster_rcnn_R_50_FPN_1x": Published(36.8, None, _ZOO),
    "e2e_faster_rcnn_R_101_FPN_1x": Published(39.1, None, _ZOO),
    "e2e_faster_rcnn_X_101_32x8d_FPN_1x": Published(41.2, None, _ZOO),
    "e2e_mask_rcnn_R_50_C4_1x": Published(35.6, 31.5, _ZOO),
    "e2e_mask_rcnn_R_50_FPN_1x": Published(37.8, 34.2, _ZOO),
    "e2e_mask_rcnn_R_101_FPN_1x": Published(40.1, 36.1, _ZOO),
    "e2e_mask_rcnn_X_101_32x8d_FPN_1x": Published(42.2, 37.8, _ZOO),
    "e2e_keypoint_rcnn_R_50_FPN_1x": Published(53.7, 64.3, _ZOO),
    "dcn/e2e_faster_rcnn_dconv_R_50_FPN_1x": Published(39.8, None, _DCN),
    "dcn/e2e_faster_rcnn_mdconv_R_50_FPN_1x": Published(40.0, None, _DCN),
    "dcn/e2e_mask_rcnn_dconv_R_50_FPN_1x": Published(40.8, 36.8, _DCN),
    "dcn/e2e_mask_rcnn_mdconv_R_50_FPN_1x": Published(40.7, 36.7, _DCN),
    "caffe2/e2e_faster_rcnn_R_50_C4_1x_caffe2": Published(34.8, None, _DETECTRON),
    "caffe2/e2e_faster_rcnn_R_50_FPN_1x_caffe2": Published(36.7, None, _DETECTRON),
    "caffe2/e2e_faster_rcnn_R_101_FPN_1x_caffe2": Published(39.4, None, _DETECTRON),
    "caffe2/e2e_faster_rcnn_X_101_32x8d_FPN_1x_caffe2": Published(41.3, None, _DETECTRON),
    "caffe2/e2e_mask_rcnn_R_50_C4_1x_caffe2": Published(35.8, 31.4, _DETECTRON),
    "caffe2/e2e_mask_rcnn_R_50_FPN_1x_caffe2": Published(37.7, 33.9, _DETECTRON),
    "caffe2/e2e_mask_rcnn_R_101_FPN_1x_caffe2": Published(40.0, 35.9, _DETECTRON),
    "caffe2/e2e_mask_rcnn_X_101_32x8d_FPN_1x_caffe2": Published(42.1, 37.3, _DETECTRON),
}


def recipes(directory: Path) -> list[str]:
    """Names of the yamls that are models: paths below `directory` without the suffix."""
    paths = (path.relative_to(directory) for path in sorted(directory.rglob("*.yaml")))
    return [path.with_suffix("").as_posix() for path in paths if path.parts[0] not in PARTS]


def size_of(file: Path) -> tuple[int, float]:
    """Parameters, batch norms' constants left out, and FLOP of one image of SIZE with DETECTIONS detections."""
    cfg = get_config(file)
    model = build_model(cfg, Device(torch.device("meta")))
    return sum(p.numel() for p in model.parameters()), inference_flops(cfg, SIZE).of(1, DETECTIONS)


def measure(file: Path, size: str = "800x1333") -> dict[str, Any] | None:
    """Milliseconds (of two steps) and peak MB of inference on one image of `size` in float32, in a process of its own,
    with the benchmark's fixed proposals; None for a model that takes longer than LIMIT or fails, which says why itself.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        options = ["--config-file", file, "--size", size, "--batch", "1", "--steps", "2", "--warmup", "1"]
        command = [sys.executable, ROOT / "tools" / "benchmark.py", "infer", *options, "--phase-steps", "1"]
        try:
            done = subprocess.run([*command, "--out", out], stdout=subprocess.DEVNULL, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            print(f"{file}: given up after {LIMIT} seconds", file=sys.stderr)
            return None
        if done.returncode:
            return None
        result = json.loads(out.read_text())
    metrics = result["cases"][0]["metrics"]
    return {
        "ms": round(metrics["step_ms"]["p50"], 1),
        "memory_mb": round(metrics["max_memory_mb"]["p50"]),
        "commit": result["environment"]["commit"],
    }


def row(name: str, size: tuple[int, float], measured: dict[str, Any] | None) -> str:
    published = PUBLISHED.get(name)
    numbers = (
        ("", "", "") if published is None else (f"{published.box:.1f}", f"{published.shape or ''}", published.source)
    )
    times = ("not measured",) * 2
    if measured is not None:
        times = (f"{measured['ms'] / 1000:.2f}", f"{measured['memory_mb']}")
    cells = (f"[{name}]({name}.yaml)", f"{size[0] / 1e6:.1f}", f"{size[1] / 1e9:.0f}", *times)
    return f"| {' | '.join((*cells, *numbers))} |"


def model_of(cfg: CfgNode) -> str:
    """What of a configuration makes the model, as it infers."""
    return repr([(k, v) for k, v in flat(cfg).items() if k.startswith("MODEL.") and not TRAINING.match(k)])


def same_models(directory: Path) -> list[list[str]]:
    """Recipes that differ in data, schedule, losses or weights alone, together: they infer alike."""
    groups: dict[str, list[str]] = {}
    for name in recipes(directory):
        groups.setdefault(model_of(get_config(directory / f"{name}.yaml")), []).append(name)
    return list(groups.values())


def rows(directory: Path) -> list[str]:
    """A row for each model, by name."""
    measured = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    found = {}
    for names in same_models(directory):
        size = size_of(directory / f"{names[0]}.yaml")
        found |= {name: row(name, size, measured.get(names[0])) for name in names}
    return [found[name] for name in sorted(found)]


def measure_all(directory: Path) -> Iterator[str]:
    """Measures what MEASURED does not hold yet, writing it after each model; the names as they are done. After BUDGET
    seconds it stops; called again it goes on."""
    measured, started = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}, time.monotonic()
    for names in same_models(directory):
        if names[0] in measured:
            continue
        if time.monotonic() - started > BUDGET:
            print("not done yet: run it again", file=sys.stderr)
            return
        if result := measure(directory / f"{names[0]}.yaml"):
            measured[names[0]] = result
            MEASURED.write_text(json.dumps(measured, indent=1) + "\n")
            yield names[0]


def write(directory: Path) -> None:
    """Replaces the table in `directory`/README.md."""
    names = ("model", "parameters, 1e6", "GFLOP an image", "seconds an image", "peak MB", "published box AP")
    names += ("published mask or keypoint AP", "published by")
    head = (f"| {' | '.join(names)} |", "|---" * len(names) + "|")
    file = directory / "README.md"
    before, _, rest = file.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    file.write_text("\n".join([before + BEGIN, *head, *rows(directory), END]) + after)
