"""What a benchmark step works on, held constant: fixed images and targets, and proposals that fix what the heads do.

The proposals and the ground truth together are as many candidates as the box head samples, and `positives` of them
match an object: so every candidate is sampled, in ours and in a peer's model alike, and nothing depends on the weights
or on random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from ..data.catalog import num_classes
from ..data.loader import collate
from ..data.synthetic import CATEGORIES, draw_image
from ..data.transforms import Polygons, Sample, offsets_of
from ..device import Device
from ..errors import UserError
from ..models.rcnn import RCNN, Detector
from ..models.retinanet import RetinaNet
from ..ops import boxes
from ..structures import ImageBatch, Proposals, Targets
from .cases import random_boxes

# Objects of an image: a little more than COCO's mean, 7.3
OBJECTS = 8
# A proposal that counts as positive overlaps its object by more than .5, others no object by .5.
POSITIVE_IOU, NEGATIVE_IOU = 0.6, 0.4
# Of the class logits of tamed weights: a few classes of each proposal pass the score threshold.
LOGIT_STD = 3.0
SEED = 0


@dataclass(frozen=True)
class Workload:
    """One batch: images and targets on the device, and the proposals [B, K] that the heads are given.

    samples: the same, image by image, as arrays: what a peer's inputs are made from.
    """

    images: ImageBatch
    targets: Targets
    proposals: Proposals
    samples: list[Sample]


def training_workload(
    cfg: CfgNode, device: Device, batch: int, size: tuple[int, int], positives: int, first: int = 0
) -> Workload:
    """`batch` images of `size` (height, width), each with `positives` positive RoIs among its sampled ones.

    first: number of the first image; images of different numbers differ.
    """
    check_positives(cfg, positives)
    objects = min(OBJECTS, positives)
    classes = cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES - 1
    samples = [draw_sample(number, size, objects, classes) for number in range(first, first + batch)]
    others = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE - positives
    drawn = [propose(sample, positives - objects, others) for sample in samples]
    return _workload(cfg, device, samples, drawn)


def check_positives(cfg: CfgNode, positives: int) -> None:
    """Raises UserError: no image of the configuration has so many positive RoIs."""
    quota = int(cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE * cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION)
    if not 1 <= positives <= quota:
        raise UserError(f"{positives} positive RoIs an image: the configuration samples 1 to {quota}")


def inference_workload(cfg: CfgNode, device: Device, batch: int, size: tuple[int, int], first: int = 0) -> Workload:
    """`batch` images, and as many proposals as the RPN would give in test mode."""
    classes = num_classes(cfg)[1] - 1
    samples = [draw_sample(number, size, OBJECTS, classes) for number in range(first, first + batch)]
    rpn = cfg.MODEL.RPN
    count = rpn.FPN_POST_NMS_TOP_N_TEST if rpn.USE_FPN else rpn.POST_NMS_TOP_N_TEST
    drawn = [random_boxes(_random(sample.image_id), count, *size, 16, 0.8 * min(size)) for sample in samples]
    return _workload(cfg, device, samples, drawn)


def _workload(cfg: CfgNode, device: Device, samples: list[Sample], drawn: list[np.ndarray]) -> Workload:
    shapes = tuple(tuple(shape) for shape in cfg.INPUT.FIXED_SHAPES)
    images, targets = collate(samples, cfg.DATALOADER.SIZE_DIVISIBILITY, shapes, bucketed=not device.compacts)
    proposed = torch.from_numpy(np.stack(drawn))
    count = proposed.shape[1]
    proposals = Proposals(
        boxes=proposed,
        scores=torch.linspace(1, 0.5, count).expand(len(samples), -1),
        valid=torch.ones(len(samples), count, dtype=torch.bool),
    )
    return Workload(*(part.to(device.torch_device) for part in (images, targets, proposals)), samples)


def draw_sample(number: int, size: tuple[int, int], objects: int, classes: int) -> Sample:
    """Image `number` of `size`, with so many objects exactly, of labels 1 to `classes` at most."""
    for attempt in range(100):
        image, shapes = draw_image(np.random.default_rng((SEED, number, attempt)), size, (objects, objects))
        if len(shapes) == objects:
            break
    else:
        raise UserError(f"{objects} objects do not find room in an image of {size[0]} x {size[1]}: make it larger")
    polygons = [polygon.astype(np.float32) for shape in shapes for polygon in shape.polygons]
    corners = [np.concatenate(shape.polygons) for shape in shapes]
    labels = list(CATEGORIES)
    return Sample(
        image=image,
        image_id=number,
        image_index=number,
        original_size=size,
        boxes=np.stack([[*points.min(0), *points.max(0)] for points in corners]).astype(np.float32),
        labels=np.array([labels.index(shape.category_id) % classes + 1 for shape in shapes]),
        polygons=Polygons(
            np.concatenate(polygons),
            offsets_of(np.array([len(polygon) for polygon in polygons])),
            offsets_of(np.array([len(shape.polygons) for shape in shapes])),
        ),
    )


def ground_truth(cfg: CfgNode, samples: list[Sample]) -> dict[str, Any]:
    """In COCO's form, with as many categories as the model knows; a category's id is its label."""
    objects = [(sample, number) for sample in samples for number in range(len(sample.boxes))]
    annotations = [
        {
            "id": place + 1,
            "image_id": sample.image_id,
            "category_id": int(sample.labels[number]),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "segmentation": [points.ravel().tolist() for points in sample.polygons.of(number)],
            "iscrowd": 0,
        }
        for place, (sample, number) in enumerate(objects)
        for x1, y1, x2, y2 in [sample.boxes[number].tolist()]
    ]
    return {
        "images": [{"id": sample.image_id, "height": sample.size[0], "width": sample.size[1]} for sample in samples],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, num_classes(cfg)[1])],
        "annotations": annotations,
    }


def propose(sample: Sample, positives: int, negatives: int) -> np.ndarray:
    """[positives + negatives, 4] boxes: the first match an object of the image, the others none."""
    random, truth = _random(sample.image_id), torch.from_numpy(sample.boxes)
    height, width = sample.size

    def near() -> np.ndarray:
        chosen = sample.boxes[random.integers(len(sample.boxes), size=1000)]
        sides = np.tile(chosen[:, 2:] - chosen[:, :2], 2)
        return np.clip(chosen + random.uniform(-0.1, 0.1, chosen.shape) * sides, 0, [width, height] * 2)

    def anywhere() -> np.ndarray:
        return random_boxes(random, 1000, height, width, 16, 0.8 * min(height, width))

    def overlap(drawn: np.ndarray) -> np.ndarray:
        return boxes.iou(torch.from_numpy(drawn).float(), truth).amax(1).numpy()

    kept = []
    for count, draw, wanted in (
        (positives, near, lambda iou: iou > POSITIVE_IOU),
        (negatives, anywhere, lambda iou: iou < NEGATIVE_IOU),
    ):
        found = np.zeros((0, 4))
        while len(found) < count:
            drawn = draw()
            found = np.concatenate([found, drawn[wanted(overlap(drawn))]])
        kept.append(found[:count])
    return np.concatenate(kept).astype(np.float32)


def _random(number: int) -> np.random.Generator:
    return np.random.default_rng((SEED, 1, number))


def repeat(workload: Workload) -> Iterator[tuple[ImageBatch, Targets]]:
    """The batch again and again, as a loader would give it."""
    while True:
        yield workload.images, workload.targets


def hold_proposals(model: Detector, proposals: Proposals) -> None:
    """The RPN does its work, and then hands these proposals on. RetinaNet has none."""
    if isinstance(model, RetinaNet):
        return
    propose = model.rpn.propose

    def propose_and_replace(*inputs: Tensor) -> Proposals:
        propose(*inputs)
        return replace(proposals)

    model.rpn.propose = propose_and_replace


@dataclass
class RoICounts:
    """RoIs of every step, as the model counted them: tensors until somebody reads them, so that nothing waits.

    sampled: of training, for the box head's losses. mask_head: what the mask head got: positives, or detections.
    """

    sampled: list[Tensor | int] = field(default_factory=list)
    mask_head: list[Tensor | int] = field(default_factory=list)

    def read(self) -> dict[str, list[int]]:
        return {name: [int(value) for value in getattr(self, name)] for name in ("sampled", "mask_head")}


def count_rois(model: RCNN) -> RoICounts:
    """Counts what the box head samples from now on."""
    counts, head = RoICounts(), model.roi_heads["box"]
    sample = head.sample

    def sample_and_count(*inputs):
        chosen = sample(*inputs)
        counts.sampled.append(chosen.valid.sum())
        counts.mask_head.append(chosen.positive.sum())
        return chosen

    head.sample = sample_and_count
    return counts


@torch.no_grad()
def tame(model: Detector, images: ImageBatch) -> None:
    """Fresh weights detect nothing. Widens the class logits (of each stage of a cascade), so that every image has more
    boxes above the score threshold than detections are kept. An RPN alone has no threshold."""
    layers = [module for name, module in model.named_modules() if name.endswith("cls_score")]
    if isinstance(model, RetinaNet):
        layers = [model.rpn["head"].cls_logits]  # seen first on its finest level
    seen: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda *call: seen.append(call[2].std())) for layer in layers]
    model.eval()
    model(images)
    for layer, handle, std in zip(layers, handles, seen):
        handle.remove()
        layer.weight *= LOGIT_STD / std
