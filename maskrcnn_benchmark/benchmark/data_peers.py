"""The loaders of torchvision's references and of detectron2, step by step, to be timed beside ours.

Both are written here from what their sources do, with the libraries they call: PIL, numpy, torch, pycocotools. Neither
project has to be installed. torchvision's masks keep the file's size: its model resizes them, in the training process.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from torch import Tensor

from ..data.coco import CocoDataset

Produce = Callable[[int], Any]


def torchvision_references(dataset: CocoDataset, short: int, longest: int) -> Produce:
    """references/detection: CocoDetection, ConvertCocoPolysToMask, RandomShortestSize of the image,
    RandomHorizontalFlip, PILToTensor and the conversion to float; masks are bitmaps."""
    by_image = _annotations(dataset)

    def produce(index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = Image.open(os.path.join(dataset.image_dir, dataset.file_names[index])).convert("RGB")
        width, height = image.size
        annotations = [a for a in by_image[dataset.image_ids[index]] if a.get("iscrowd", 0) == 0]
        boxes = torch.as_tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(min=0, max=width)
        boxes[:, 1::2].clamp_(min=0, max=height)
        masks = torch.zeros((len(annotations), height, width), dtype=torch.uint8)
        if annotations:
            drawn = []
            for annotation in annotations:
                rles = coco_mask.frPyObjects(annotation["segmentation"], height, width)
                drawn.append(torch.as_tensor(coco_mask.decode(rles), dtype=torch.uint8).any(dim=2))
            masks = torch.stack(drawn)
        keep = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
        boxes, masks = boxes[keep], masks[keep]
        labels = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)[keep]

        ratio = min(short / min(height, width), longest / max(height, width))
        size = (int(width * ratio), int(height * ratio))
        image = image.resize(size, Image.BILINEAR)
        boxes = boxes * torch.tensor([size[0] / width, size[1] / height] * 2)
        if random.random() < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
            boxes[:, [0, 2]] = size[0] - boxes[:, [2, 0]]
            masks = masks.flip(-1)
        pixels = torch.as_tensor(np.array(image, copy=True)).permute(2, 0, 1).to(torch.float32) / 255
        return pixels, {"boxes": boxes, "labels": labels, "masks": masks}

    return produce


def detectron2_mapper(dataset: CocoDataset, short: int, longest: int) -> Produce:
    """DatasetMapper with ResizeShortestEdge and RandomFlip, from its pickled list of dicts; masks are polygons."""
    by_image = _annotations(dataset)
    pickled = []
    for index, image_id in enumerate(dataset.image_ids):
        path = os.path.join(dataset.image_dir, dataset.file_names[index])
        height, width = dataset.sizes[index].tolist()
        annotations = [
            {key: a[key] for key in ("bbox", "segmentation", "category_id", "iscrowd")} for a in by_image[image_id]
        ]
        record = {"file_name": path, "height": height, "width": width, "annotations": annotations}
        pickled.append(pickle.dumps(record, protocol=-1))

    def produce(index: int) -> dict[str, Any]:
        record = copy.deepcopy(pickle.loads(pickled[index]))
        image = ImageOps.exif_transpose(Image.open(record["file_name"])).convert("RGB")
        pixels = np.asarray(image)[:, :, ::-1]
        height, width = pixels.shape[:2]
        scale = short / min(height, width)
        scale = min(scale, longest / max(height * scale, width * scale) * scale)
        size = (int(height * scale + 0.5), int(width * scale + 0.5))
        pixels = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.BILINEAR))
        ratio = np.array([size[1] / width, size[0] / height])
        flip = random.random() < 0.5
        if flip:
            pixels = np.flip(pixels, axis=1)
        record["image"] = torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

        def move(points: np.ndarray) -> np.ndarray:
            points = points * ratio
            if flip:
                points[:, 0] = size[1] - points[:, 0]
            return points

        boxes, polygons, classes = [], [], []
        for annotation in record.pop("annotations"):
            if annotation["iscrowd"]:
                continue
            x, y, w, h = annotation["bbox"]
            corners = move(np.array([[x, y], [x + w, y], [x, y + h], [x + w, y + h]]))
            box = np.concatenate([corners.min(axis=0), corners.max(axis=0)]).clip(min=0)
            boxes.append(np.minimum(box, [size[1], size[0], size[1], size[0]]))
            polygons.append([move(np.asarray(p).reshape(-1, 2)).reshape(-1) for p in annotation["segmentation"]])
            classes.append(annotation["category_id"])
        tensor = torch.as_tensor(np.array(boxes, np.float32).reshape(-1, 4))
        nonempty = (tensor[:, 2] > tensor[:, 0]) & (tensor[:, 3] > tensor[:, 1])
        nonempty &= torch.tensor([len(parts) > 0 for parts in polygons], dtype=torch.bool)
        kept = nonempty.nonzero().flatten().tolist()
        record["boxes"], record["classes"] = tensor[nonempty], torch.tensor(classes, dtype=torch.int64)[nonempty]
        record["masks"] = [[np.asarray(p, np.float64) for p in polygons[i]] for i in kept]
        return record

    return produce


PEERS = {"torchvision": torchvision_references, "detectron2": detectron2_mapper}


def _annotations(dataset: CocoDataset) -> dict[int, list[dict[str, Any]]]:
    """Image id -> its annotations as the file has them, as pycocotools' index gives them."""
    by_image: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in dataset.image_ids}
    with open(dataset.annotation_file, encoding="utf-8") as file:
        for annotation in json.load(file)["annotations"]:
            by_image[annotation["image_id"]].append(annotation)
    return by_image
