"""Published weights: `catalog://NAME` in MODEL.WEIGHT is a file of the cache directory. Never downloaded implicitly.

Addresses are the projects' own: maskrcnn-benchmark's ModelCatalog, the model zoos of detectron2, MMDetection and
PaddleDetection, torchvision's and timm's sources. torchvision, timm and MMDetection end a file's name in the first
eight digits of its SHA-256, which is what is known of it here; the others publish none.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

from ...data import download
from ...errors import CheckpointError

logger = logging.getLogger(__name__)


class Published(NamedTuple):
    """sha256: the digest or its first digits, None where nobody published it."""

    address: str
    sha256: str | None
    licence: str


_CC = "CC BY-SA 3.0"
_DETECTRON, _DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron", "https://dl.fbaipublicfiles.com/detectron2"
_TORCH = "https://download.pytorch.org/models"
_MMDET = "https://download.openmmlab.com/mmdetection/v2.0"
_PADDLE = "https://paddledet.bj.bcebos.com/models/pretrained"
_TIMM = "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-weights"


def _detectron(number: str, model: str, signature: str) -> tuple[str, Published]:
    sets = "{0}coco_2014_train%3A{0}coco_2014_valminusminival".format("keypoints_" if "keypoint" in model else "")
    path = f"{number}/12_2017_baselines/{model}.yaml.{signature}/output/train/{sets}/generalized_rcnn/model_final.pkl"
    return f"Caffe2Detectron/COCO/{number}/{model}", Published(f"{_DETECTRON}/{path}", None, _CC)


def _imagenet(name: str, path: str) -> tuple[str, Published]:
    return f"ImageNetPretrained/{name}", Published(f"{_DETECTRON}/ImageNetPretrained/{path}.pkl", None, _CC)


def _named_by_hash(project: str, directory: str, file: str, licence: str) -> tuple[str, Published]:
    """`file` ends in the hash's first digits."""
    name, _, sha256 = file.rpartition("-")
    return f"{project}/{name}", Published(f"{directory}/{file}.pth", sha256, licence)


def _mmdet(family: str, config: str, suffix: str) -> tuple[str, Published]:
    address = f"{_MMDET}/{family}/{config}/{config}_{suffix}.pth"
    return f"mmdet/{config}", Published(address, suffix.rpartition("-")[2], "Apache 2.0")


CATALOG: dict[str, Published] = dict(
    [
        _imagenet("MSRA/R-50", "MSRA/R-50"),
        _imagenet("MSRA/R-101", "MSRA/R-101"),
        _imagenet("MSRA/R-50-GN", "47261647/R-50-GN"),
        _imagenet("MSRA/R-101-GN", "47592356/R-101-GN"),
        _imagenet("FAIR/20171220/X-101-32x8d", "20171220/X-101-32x8d"),
        _detectron("35857197", "e2e_faster_rcnn_R-50-C4_1x", "01_33_49.iAX0mXvW"),
        _detectron("35857345", "e2e_faster_rcnn_R-50-FPN_1x", "01_36_30.cUF7QR7I"),
        _detectron("35857890", "e2e_faster_rcnn_R-101-FPN_1x", "01_38_50.sNxI7sX7"),
        _detectron("36761737", "e2e_faster_rcnn_X-101-32x8d-FPN_1x", "06_31_39.5MIHi1fZ"),
        _detectron("35858791", "e2e_mask_rcnn_R-50-C4_1x", "01_45_57.ZgkA7hPB"),
        _detectron("35858933", "e2e_mask_rcnn_R-50-FPN_1x", "01_48_14.DzEQe4wC"),
        _detectron("35861795", "e2e_mask_rcnn_R-101-FPN_1x", "02_31_37.KqyEK4tT"),
        _detectron("36761843", "e2e_mask_rcnn_X-101-32x8d-FPN_1x", "06_35_59.RZotkLKI"),
        _detectron("37129812", "e2e_mask_rcnn_X-152-32x8d-FPN-IN5k_1.44x", "09_35_36.8pzTQKYK"),
        _detectron("37697547", "e2e_keypoint_rcnn_R-50-FPN_1x", "08_42_54.kdzV35ao"),
        *(
            _named_by_hash("torchvision", _TORCH, file, "BSD 3-Clause")
            for file in (
                "resnet18-f37072fd",
                "resnet34-b627a593",
                "resnet50-0676ba61",
                "resnet101-63fe2227",
                "resnet152-394f9c45",
                "resnext101_32x8d-8ba56ff5",
                "fasterrcnn_resnet50_fpn_coco-258fb6c6",
                "maskrcnn_resnet50_fpn_coco-bf2d0c1e",
                "keypointrcnn_resnet50_fpn_coco-fc266e95",
                "retinanet_resnet50_fpn_coco-eeacb38b",
            )
        ),
        _named_by_hash("timm", _TIMM, "resnet50d_ra2-464e36ba", "Apache 2.0"),
        *(
            (f"detectron2/{path.split('/')[1]}", Published(f"{_DETECTRON2}/{path}.pkl", None, _CC))
            for path in (
                "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x/137260431/model_final_a54504",
                "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217",
                "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x/137259246/model_final_9243eb",
                "COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758",
                "COCO-Detection/retinanet_R_50_FPN_1x/190397773/model_final_bfca0b",
                "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x/137849621/model_final_a6e10b",
            )
        ),
        _mmdet("faster_rcnn", "faster_rcnn_r50_fpn_1x_coco", "20200130-047c8118"),
        _mmdet("mask_rcnn", "mask_rcnn_r50_fpn_1x_coco", "20200205-d4b0c5d6"),
        _mmdet("retinanet", "retinanet_r50_fpn_1x_coco", "20200130-c2398f9e"),
        _mmdet("cascade_rcnn", "cascade_mask_rcnn_r50_fpn_1x_coco", "20200203-9d4dcb24"),
        *(
            (f"paddledetection/{name}", Published(f"{_PADDLE}/{name}_pretrained.pdparams", None, "Apache 2.0"))
            for name in ("ResNet50_cos", "ResNet50_vd_ssld")
        ),
    ]
)


def cache_dir() -> Path:
    """Where catalog:// names are looked up: $MASKRCNN_CACHE, or ~/.cache/maskrcnn_benchmark."""
    return Path(os.environ.get("MASKRCNN_CACHE") or Path.home() / ".cache" / "maskrcnn_benchmark")


def find(name: str) -> Published:
    """Raises CheckpointError for an unknown name."""
    if name not in CATALOG:
        raise CheckpointError(f"catalog://{name} is not in the catalogue; it has {', '.join(CATALOG)}")
    return CATALOG[name]


def cached(name: str) -> Path:
    """Where the weights of that name lie, or would: the file's own name where it says which model it is."""
    suffix = Path(find(name).address).suffix
    return cache_dir() / f"{name.rpartition('/')[2]}{suffix}"


def resolve(path: str) -> Path:
    """The file that MODEL.WEIGHT names.

    Raises:
        CheckpointError: an unknown catalog:// name, or one whose file has not been downloaded.
    """
    if not path.startswith("catalog://"):
        return Path(path).expanduser()
    name = path.removeprefix("catalog://")
    file = cached(name)
    if not file.is_file():
        raise CheckpointError(
            f"MODEL.WEIGHT {path} is not on this machine, and nothing is downloaded implicitly: run `python"
            f" tools/convert_weights.py --download {name}`, or put {find(name).address} to {file} yourself; or train"
            ' from scratch with MODEL.WEIGHT ""'
        )
    return file


def fetch(name: str, sha256: str | None = None, unverified: bool = False, mirror: str = "") -> Path:
    """Downloads the weights of that name into the cache and verifies them; what is there already stays.

    Args:
        sha256: the file's digest, in place of the catalogue's.
        unverified: take a file of unknown digest as it comes; its digest is logged.
        mirror: address under which the file lies by its own name, instead of the project's.

    Raises:
        CheckpointError: unknown name, or unknown digest.
        DataError: nothing there, or a file that differs from its digest.
    """
    published, file = find(name), cached(name)
    expected = sha256 or published.sha256
    if expected is None and not unverified:
        raise CheckpointError(
            f"nobody has published the SHA-256 of {published.address}: give it by --sha256 HASH, or accept whatever the"
            " server sends by --unverified"
        )
    if file.is_file():
        logger.info("%s is there already", file)
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    address = f"{mirror.rstrip('/')}/{published.address.rpartition('/')[2]}" if mirror else published.address
    unchecked = file.with_name(f"{file.name}.unverified")
    if not unchecked.is_file():
        download.fetch(address, unchecked)
    download.verify(unchecked, expected)
    os.replace(unchecked, file)
    return file
