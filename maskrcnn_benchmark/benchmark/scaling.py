"""`benchmark.py scaling`: what training on many devices would give, reckoned from one device's step. No measurement.

Each device keeps its batch and its step; what is added is the part of the gradients' exchange that the backward pass
does not hide. The formulas, and what they leave out, are in docs/scaling.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from ..config import parse_config
from ..errors import UserError
from . import flops, results

# Bytes of a gradient's value: parameters are float32, whatever autocast computes in
BYTES = 4
MB = 2**20
# COCO 2017: training images with an object, images of val2017
TRAIN_IMAGES, TEST_IMAGES = 117_266, 5_000


@dataclass(frozen=True)
class Link:
    """gb_per_second: 10^9 bytes a second that a device sends, while it receives as many. microseconds: of a message."""

    gb_per_second: float
    microseconds: float

    def seconds(self, messages: int, message_bytes: float) -> float:
        """Of messages that follow one another."""
        return messages * (self.microseconds / 1e6 + message_bytes / (self.gb_per_second * 1e9))


@dataclass(frozen=True)
class Cluster:
    """Devices in nodes of `per_node`. Every device has a link to the network of its own. launch_microseconds: of an
    exchange, however many take part. The defaults are assumptions, see ASSUMED."""

    per_node: int = 8
    node: Link = Link(360.0, 3.4)
    network: Link = Link(40.0, 14.0)
    launch_microseconds: float = 8.4

    def nodes(self, devices: int) -> int:
        """Raises UserError: the devices do not fill their nodes."""
        if devices > self.per_node and devices % self.per_node:
            raise UserError(f"{devices} devices do not fill nodes of {self.per_node}: see --devices-per-node")
        return max(1, devices // self.per_node)

    def all_reduce_seconds(self, size: float, devices: int) -> float:
        """Of `size` bytes: rings in the nodes scatter the sums, rings across nodes add each device's part to the other
        nodes', rings in the nodes gather them. One node, or one device a node: the plain ring,
        2 (n - 1) / n size / bandwidth + 2 (n - 1) latency (Patarasuk and Yuan 2009)."""
        nodes = self.nodes(devices)
        inside = devices // nodes
        seconds = self.node.seconds(2 * (inside - 1), size / inside)
        seconds += self.network.seconds(2 * (nodes - 1), size / devices)
        return seconds + self.launch_microseconds / 1e6


ASSUMED = {
    "node": "a device's link in its node: 80% of NVLink 4's 450 GB/s each way; a step's latency in NCCL's ring, from"
    " its src/graph/tuning.cc",
    "network": "a device's own link between nodes: 80% of InfiniBand's or RoCE's 400 Gb/s each way; latency as above",
    "launch": "of every exchange, as above",
}


@dataclass(frozen=True)
class Step:
    """Of one device. source: where the milliseconds come from, for people."""

    milliseconds: float
    backward: float
    images: int
    source: str


@dataclass(frozen=True)
class Bucket:
    """Gradients that are exchanged together. ready: the share of the backward pass after which all are there."""

    size: int
    gradients: int
    ready: float


def buckets(gradients: Sequence[flops.Gradient], bucket_mb: float) -> list[Bucket]:
    """As DistributedDataParallel fills them from its second step on: in the order in which gradients come, a bucket is
    closed by the one with which it reaches its size (inf: all are in one)."""
    filled: list[Bucket] = []
    size = count = 0
    for number, gradient in enumerate(gradients, 1):
        size, count = size + BYTES * gradient.values, count + 1
        if size >= bucket_mb * MB or number == len(gradients):
            filled.append(Bucket(size, count, gradient.ready))
            size = count = 0
    return filled


@dataclass(frozen=True)
class Prediction:
    """Of so many devices, in milliseconds a step.

    all_reduce: all exchanges, one after the other. exposed: the part after the backward pass. overlap: the share of the
    backward pass during which gradients are exchanged. efficiency: images/s over devices times one device's.
    bound_by: what a step waits for: "computing", "network" or "data".
    """

    devices: int
    nodes: int
    all_reduce: float
    exposed: float
    overlap: float
    step: float
    efficiency: float
    images_per_second: float
    bound_by: str


def predict(
    step: Step, filled: Sequence[Bucket], cluster: Cluster, devices: int, loader: float | None = None
) -> Prediction:
    """A bucket's exchange begins when its gradients are there and the bucket before it is done. loader: images/s that
    the loader of one device gives, or None: enough."""
    end = all_reduce = 0.0
    for bucket in filled if devices > 1 else ():
        cost = 1000 * cluster.all_reduce_seconds(bucket.size, devices)
        end = max(end, bucket.ready * step.backward) + cost
        all_reduce += cost
    exposed = max(0.0, end - step.backward)
    computed = step.milliseconds + exposed
    loaded = 1000 * step.images / loader if loader else 0.0
    whole = max(computed, loaded)
    bound_by = "data" if loaded > computed else "network" if exposed > 0.01 * whole else "computing"
    return Prediction(
        devices=devices,
        nodes=cluster.nodes(devices),
        all_reduce=all_reduce,
        exposed=exposed,
        overlap=max(0.0, all_reduce - exposed) / step.backward,  # rounding
        step=whole,
        efficiency=step.milliseconds / whole,
        images_per_second=1000 * step.images * devices / whole,
        bound_by=bound_by,
    )


@dataclass(frozen=True)
class Evaluation:
    """infer: images/s of one device, from a batch to results. scoring: the main rank's seconds for one test set, while
    the next epoch trains (TEST.OVERLAP), or None."""

    infer: float
    scoring: float | None


@dataclass(frozen=True)
class Epoch:
    """Seconds: of training; of inference over the test set, for which training stops; and of scoring that is not over
    when the next epoch is. share: of the time that evaluation after every epoch takes."""

    training: float
    inference: float
    waiting: float
    share: float


def epoch(
    prediction: Prediction, evaluation: Evaluation, images: int = TRAIN_IMAGES, test_images: int = TEST_IMAGES
) -> Epoch:
    training = images / prediction.images_per_second
    inference = test_images / (evaluation.infer * prediction.devices)
    waiting = max(0.0, (evaluation.scoring or 0.0) - training)
    return Epoch(training, inference, waiting, (inference + waiting) / (training + inference + waiting))


# ---- what is measured


def read_step(path: Path, dtype: str | None, overrides: Sequence[str]) -> tuple[CfgNode, tuple[int, int], int, Step]:
    """Of a file that `benchmark.py train --out` wrote on one device: its configuration with these overrides, height and
    width of the images, positive RoIs an image in the mask head, and the step.

    Raises UserError: there is no such case, or not one alone.
    """
    case = _only(path, "train", dtype)
    work = case["work"]
    if work["data"] != "synthetic":
        raise UserError(f"{path}: real data have no one image size: measure with --data synthetic")
    cfg = parse_config(json.dumps(case["config"]), f"the configuration in {path}", overrides)
    parts = {name: _median(path, case, f"{name}_ms") for name in ("data", "forward", "backward", "optimizer")}
    whole = _median(path, case, "step_ms")
    share = parts["backward"] / sum(parts.values())
    step = Step(whole, whole * share, work["batch"], f"measured, {path.name}: {case['name']}")
    return cfg, tuple(work["image"]), max(1, round(work["mask_head_rois"] / work["batch"])), step


def given_step(cfg: CfgNode, size: tuple[int, int], positives: int, milliseconds: float, images: int) -> Step:
    """Of so many milliseconds, of which the backward pass has the share that it has of the FLOP."""
    forward, both = (flops.training_flops(cfg, size, backward).of(1, positives) for backward in (False, True))
    return Step(milliseconds, milliseconds * (1 - forward / both), images, "--step-ms; backward by its share of FLOP")


def read_loader(path: Path) -> float:
    """Images/s of one device's loader, from `benchmark.py data --out`."""
    return _median(path, _only(path, "data", None), "images_per_second_overall")


def read_evaluation(infer: Path, dtype: str | None, scored: Path | None, test_images: int) -> Evaluation:
    """From `benchmark.py infer --out` and `eval --out`; scoring of the latter's detections, boxes and masks, with the
    faster engine, is taken to be in proportion to the images."""
    rate = _median(infer, _only(infer, "infer", dtype), "images_per_second")
    if scored is None:
        return Evaluation(rate, None)
    cases = [case for case in results.read(scored)["cases"] if case["name"].startswith("eval detections ")]
    if not cases:
        raise UserError(f"{scored} has no case of eval detections: write it with benchmark.py eval --out")
    seconds = min(_median(scored, case, "eval_seconds") / case["work"]["images"] for case in cases)
    return Evaluation(rate, seconds * test_images)


def _only(path: Path, kind: str, dtype: str | None) -> dict[str, Any]:
    """The one case of ours of that kind."""
    result = results.read(path)
    ranks = result["environment"].get("world_size", 1)
    if ranks != 1:
        raise UserError(f"{path} was measured on {ranks} devices: measure one")
    cases = [case for case in result["cases"] if case["kind"] == kind and case.get("system", "ours") == "ours"]
    cases = [case for case in cases if dtype is None or case["dtype"] == dtype]
    if len(cases) != 1:
        found = "; ".join(f"{case['kind']} {case['dtype']} {case['name']}" for case in result["cases"]) or "none"
        raise UserError(f"{path} must have one case of {kind} to reckon with (--dtype chooses); there are: {found}")
    return cases[0]


def _median(path: Path, case: dict[str, Any], name: str) -> float:
    if name not in case["metrics"]:
        raise UserError(f"{path}, case {case['name']!r}: it has no {name}; measure with --phase-steps above 0")
    return case["metrics"][name]["p50"]


# ---- results


def describe(
    step: Step,
    filled: Sequence[Bucket],
    cluster: Cluster,
    predictions: Sequence[Prediction],
    loader: float | None,
    epochs: Sequence[Epoch],
) -> dict[str, Any]:
    """For the JSON file."""
    values = {"node": asdict(cluster.node), "network": asdict(cluster.network), "launch": cluster.launch_microseconds}
    return {
        "benchmark": "scaling",
        "step": asdict(step),
        "bytes": sum(bucket.size for bucket in filled),
        "trainable_parameters": sum(bucket.size for bucket in filled) // BYTES,
        "buckets": [asdict(bucket) for bucket in filled],
        "devices_per_node": cluster.per_node,
        "links": values,
        "default_links": ASSUMED,
        "loader_images_per_second": loader,
        "predictions": [asdict(prediction) for prediction in predictions],
        "epochs": [asdict(one) for one in epochs],
    }


def summary(about: dict[str, Any]) -> list[str]:
    """Lines for people."""
    step, links, default = about["step"], about["links"], Cluster(about["devices_per_node"])
    rate = 1000 * step["images"] / step["milliseconds"]
    lines = [
        f"{about['trainable_parameters']:,} trainable parameters: {about['bytes'] / 1e6:.1f} MB (10^6) of float32"
        f" gradients all-reduced a step, in {len(about['buckets'])} buckets",
        f"one device: step {step['milliseconds']:.1f} ms with {step['images']} images, backward"
        f" {step['backward']:.1f} ms, {rate:.2f} images/s ({step['source']})",
        "bucket      MB  gradients  there after",
    ]
    for number, bucket in enumerate(about["buckets"], 1):
        share = f"{bucket['ready']:.0%} of backward"
        lines.append(f"{number:6}  {bucket['size'] / 1e6:6.1f}  {bucket['gradients']:9}  {share}")
    for name in ("node", "network"):
        link = links[name]
        assumed = f"assumed: {ASSUMED[name]}" if link == asdict(getattr(default, name)) else "as given"
        lines.append(f"{name}: {link['gb_per_second']:g} GB/s each way, {link['microseconds']:g} us ({assumed})")
    assumed = f"assumed: {ASSUMED['launch']}" if links["launch"] == default.launch_microseconds else "as given"
    lines += [
        f"launch: {links['launch']:g} us ({assumed})",
        "devices  nodes  all-reduce ms  of backward  exposed ms   step ms  efficiency  images/s  bound by",
    ]
    for p in about["predictions"]:
        lines.append(
            f"{p['devices']:7}  {p['nodes']:5}  {p['all_reduce']:13.2f}  {p['overlap']:11.1%}  {p['exposed']:10.3f}"
            f"  {p['step']:8.2f}  {p['efficiency']:10.1%}  {p['images_per_second']:8.1f}  {p['bound_by']}"
        )
    for p, one in zip(about["predictions"], about["epochs"]):
        lines.append(
            f"{p['devices']} devices, an epoch: {one['training']:.1f} s of training, {one['inference']:.1f} s of"
            f" inference, {one['waiting']:.1f} s waiting for scores; {one['share']:.1%} is evaluation"
        )
    return lines
