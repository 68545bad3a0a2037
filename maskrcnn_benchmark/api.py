"""The package from Python, by PaddleX's names: parameters become configuration keys, and the work is done by the very
functions that the tools call. docs/api.md lists which parameter becomes which key."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlencode

import cv2
import numpy as np
from yacs.config import CfgNode

from .config import dump, get_config, parse_config
from .config.conv_body import parse
from .data import transforms as known_transforms
from .data.catalog import AnyDataset, open_datasets
from .data.images import read_image
from .device import get_device
from .engine import checkpoint, distributed
from .engine.datasets import test_datasets
from .engine.inference import evaluate_model
from .engine.predict import Predictor, detect_images, load_predictor, save_predictor
from .engine.train import prepare_output, run_training
from .errors import CheckpointError, ConfigError, DataError
from .evaluation.coco import load_results
from .models.weights import CATALOG
from .ops.rle import decode_rle
from .report.console import setup_logging
from .report.visualize import draw

logger = logging.getLogger(__name__)

Spec = dict[str, Any]

# PaddleX's backbones -> MODEL.BACKBONE.CONV_BODY without its ending
BACKBONES = {
    "ResNet18": "R-18",
    "ResNet50": "R-50",
    "ResNet50_vd": "R-50vd",
    "ResNet50_vd_ssld": "R-50vd",
    "ResNet101": "R-101",
    "ResNet101_vd": "R-101vd",
    "HRNet_W18": "HRNet-W18",
}
METRICS = {"COCO": ("coco",), "VOC": ("coco", "voc07")}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# torchvision's arithmetic, as in configs/conventions/torchvision.yaml, so that its COCO weights fit; an installed
# package has no configs/. Weight decay is PaddleX's, for biases too.
COMMON: dict[str, Any] = {
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RPN.STRADDLE_THRESH": -1,
    "MODEL.RPN.ANCHOR_ROUNDING": "corners",
    "MODEL.RPN.ANCHOR_GRID": "image",
    "MODEL.RPN.MIN_SIZE": 0.001,
    "MODEL.RPN.FPN_POST_NMS_PER_BATCH": False,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
    "MODEL.ROI_BOX_HEAD.POOLER_ALIGNED": False,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 1 / 9,
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 2,
    "MODEL.ROI_MASK_HEAD.POOLER_ALIGNED": False,
    "MODEL.ROI_MASK_HEAD.SOFT_BITMAP_TARGETS": True,
    "MODEL.ROI_MASK_HEAD.PASTE_WHOLE_PIXELS": True,
    "INPUT.TO_BGR255": False,
    "SOLVER.BIAS_LR_FACTOR": 1.0,
    "SOLVER.WEIGHT_DECAY": 1e-4,
    "SOLVER.WEIGHT_DECAY_BIAS": 1e-4,
}
_SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
# What -FPN bodies need, as in configs/_base_/mask_rcnn_fpn.yaml
FPN: dict[str, Any] = {
    "MODEL.RPN.USE_FPN": True,
    "MODEL.RPN.ANCHOR_STRIDE": (4, 8, 16, 32, 64),
    "MODEL.RPN.PRE_NMS_TOP_N_TRAIN": 2000,
    "MODEL.ROI_HEADS.USE_FPN": True,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_BOX_HEAD.POOLER_SCALES": _SCALES,
    "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR": "FPN2MLPFeatureExtractor",
    "MODEL.ROI_BOX_HEAD.PREDICTOR": "FPNPredictor",
    "MODEL.ROI_MASK_HEAD.POOLER_SCALES": _SCALES,
    "MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR": "MaskRCNNFPNFeatureExtractor",
    "MODEL.ROI_MASK_HEAD.RESOLUTION": 28,
    "MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR": False,
    "DATALOADER.SIZE_DIVISIBILITY": 32,
}


# --------------------------------------------------------------------------------------------- transforms


def _spec_of(transform: type) -> Callable[..., Spec]:
    """A function with the transform's signature that gives the mapping which INPUT.TRANSFORMS takes."""

    @functools.wraps(transform, updated=())
    def make(*args: Any, **kwargs: Any) -> Spec:
        spec = {"type": transform.__name__, **inspect.signature(transform).bind(*args, **kwargs).arguments}
        known_transforms.build(spec)  # refuses a value that cannot be, where it is written
        return spec

    return make


# transforms.NAME(...) for every name of docs/data.md. Plain mappings, because checkpoints and config.yaml hold them.
transforms = SimpleNamespace(
    Compose=list, **{name: _spec_of(transform) for name, transform in known_transforms.TRANSFORMS.items()}
)


def normalize_keys(specs: Sequence[Spec]) -> dict[str, Any]:
    """INPUT.PIXEL_MEAN, PIXEL_STD and TO_BGR255 of a Normalize among the transforms, if there is one."""
    for transform in known_transforms.build(list(specs)):
        if isinstance(transform, known_transforms.Normalize):
            return {f"INPUT.{key}": value for key, value in transform.settings.items()}
    return {}


def eval_keys(specs: Sequence[Spec] | None) -> dict[str, Any]:
    """The keys that say what is done to images in evaluation and prediction: resizing, and nothing that is random."""
    if specs is None:
        return {}
    built = known_transforms.build(list(specs))
    resizing = [t for t in built if isinstance(t, known_transforms.ResizeShortSide)]
    others = [t for t in built if not isinstance(t, (known_transforms.Normalize, known_transforms.Padding))]
    if len(resizing) != 1 or others != resizing or len(resizing[0].sizes) != 1:
        names = ", ".join(spec["type"] for spec in specs) or "none"
        raise ConfigError(
            "transforms for evaluation and prediction are one ResizeByShort with one short_size, and where wanted"
            f" Normalize and Padding; these are {names}"
        )
    most = resizing[0].max_size
    return {"INPUT.MIN_SIZE_TEST": resizing[0].sizes[0], "INPUT.MAX_SIZE_TEST": 2**30 if most == float("inf") else most}


# ----------------------------------------------------------------------------------------------- data sets


class Dataset:
    """A data set by the name that DATASETS.TRAIN and DATASETS.TEST take, and what is done to its images.

    Args:
        name: of the catalogue, `FORMAT://PATH?option=value` or `module:Class` (docs/data.md); `name[:100]` is a part.
        transforms: a list of `transforms.NAME(...)`; None: the configuration's own, a short side of 800 and flips.
        data_dir: directory that relative paths start from, and that a Python class gets (DATA.PATH).
        num_workers: processes that read images; "auto": half the cores, at most 4.
        shuffle: images are trained on in a new order every epoch, so False is an error in training. Evaluation does not
            depend on the order.

    Attributes:
        labels: "background" and the classes' names. So `num_classes=len(dataset.labels)` is right as it stands.
    """

    metric = "COCO"

    def __init__(
        self,
        name: str,
        transforms: Sequence[Spec] | None = None,
        data_dir: str | Path = "",
        num_workers: int | str = "auto",
        shuffle: bool = True,
    ) -> None:
        self.name, self.transforms, self.data_dir, self.shuffle = name, transforms, str(data_dir), shuffle
        self.num_workers = min(4, (os.cpu_count() or 1) // 2) if num_workers == "auto" else num_workers

    @cached_property
    def labels(self) -> list[str]:
        """Reads the annotations. Raises ConfigError, DataError."""
        return ["background", *open_datasets((self.name,), self.data_dir, masks=False).category_names]


class CocoDetection(Dataset):
    """A COCO instances file. data_dir: the images' directory; ann_file: the JSON file; otherwise as Dataset."""

    def __init__(self, data_dir: str | Path, ann_file: str | Path, transforms: Sequence[Spec] | None = None, **options):
        images, file = Path(data_dir).resolve(), Path(ann_file).resolve()
        super().__init__(f"coco://{file}?images={quote(str(images))}", transforms, **options)


class VOCDetection(Dataset):
    """Pascal VOC's directory, such as VOCdevkit/VOC2012; split, imageset, classes as in docs/data.md (`voc://`);
    otherwise as Dataset. Judged by VOC's AP where no metric is given."""

    metric = "VOC"

    def __init__(
        self,
        data_dir: str | Path,
        transforms: Sequence[Spec] | None = None,
        split: str = "",
        imageset: str = "",
        classes: Sequence[str] = (),
        **options: Any,
    ) -> None:
        given = {"split": split, "imageset": imageset, "classes": ",".join(classes)}
        query = urlencode({key: value for key, value in given.items() if value})
        super().__init__(f"voc://{Path(data_dir).resolve()}{'?' if query else ''}{query}", transforms, **options)


datasets = SimpleNamespace(Dataset=Dataset, CocoDetection=CocoDetection, VOCDetection=VOCDetection)


# ----------------------------------------------------------------------------------------------- detectors


class FasterRCNN:
    """Faster R-CNN with PaddleX's parameters and defaults (paddlex.det, version 1).

    Args:
        num_classes: the classes **and the background**: 3 for people and dogs. Another number than the data's is an
            error; `len(dataset.labels)` counts the background already.
        backbone: a key of BACKBONES. HRNet_W18 has a pyramid always. For a module of your own build
            `models.rcnn.RCNN(backbone=...)` (docs/models.md).
        with_fpn: a feature pyramid; False: the C4 model.
        aspect_ratios: of anchors, height : width. anchor_sizes: their sides in pixels of the resized image, with a
            pyramid one for each of five levels.
        with_dcn: modulated deformable convolutions in res3 to res5.
        rpn_cls_loss: SigmoidCrossEntropy, or SigmoidFocalLoss, whose alpha (0..1) and gamma are rpn_focal_loss_alpha
            and rpn_focal_loss_gamma.
        rcnn_bbox_loss: SmoothL1Loss, or CIoULoss, which counts 10 times, as in PaddleX.
        rcnn_nms: MultiClassNMS, MultiClassSoftNMS (advised with keep_top_k 300 and score_threshold .01) or
            MultiClassCiouNMS.
        keep_top_k: most detections of an image. nms_threshold: IoU from which a lower score of the same class goes; not
            used by MultiClassSoftNMS. score_threshold: least score. softnms_sigma: scores fall with
            exp(-IoU^2 / softnms_sigma).
        bbox_assigner: BBoxAssigner, or LibraBBoxAssigner, which balances the negatives by their IoU.
        fpn_num_channels: of every level of the pyramid. input_channel: of images; data sets give 3.
        rpn_batch_size_per_im: anchors sampled for the RPN's loss in an image; rpn_fg_fraction: most positives of them.
        test_pre_nms_top_n: proposals before NMS when predicting, with a pyramid a level; None: 6000 with a pyramid,
            1000 without. test_post_nms_top_n: after NMS, an image.
        device: auto, cpu, cuda, cuda:1, npu, mps, xpu or a plug-in.
        overrides: further configuration keys, e.g. {"MODEL.CASCADE_ON": True}; they win over all parameters.

    Attributes:
        cfg: the resolved configuration.

    Raises ConfigError: a value that cannot be, an unknown key.
    """

    masks = False
    coco_weights = "torchvision/fasterrcnn_resnet50_fpn_coco"

    def __init__(
        self,
        num_classes: int = 81,
        backbone: str = "ResNet50",
        with_fpn: bool = True,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
        with_dcn: bool = False,
        rpn_cls_loss: str = "SigmoidCrossEntropy",
        rpn_focal_loss_alpha: float = 0.25,
        rpn_focal_loss_gamma: float = 2,
        rcnn_bbox_loss: str = "SmoothL1Loss",
        rcnn_nms: str = "MultiClassNMS",
        keep_top_k: int = 100,
        nms_threshold: float = 0.5,
        score_threshold: float = 0.05,
        softnms_sigma: float = 0.5,
        bbox_assigner: str = "BBoxAssigner",
        fpn_num_channels: int = 256,
        input_channel: int = 3,
        rpn_batch_size_per_im: int = 256,
        rpn_fg_fraction: float = 0.5,
        test_pre_nms_top_n: int | None = None,
        test_post_nms_top_n: int = 1000,
        device: str = "auto",
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        if test_pre_nms_top_n is None:
            test_pre_nms_top_n = 6000 if with_fpn else 1000
        keys = {
            "MODEL.MASK_ON": self.masks,
            "MODEL.DEVICE": device,
            **body_keys(backbone, with_fpn, fpn_num_channels, input_channel),
            "MODEL.ROI_BOX_HEAD.NUM_CLASSES": num_classes,
            "MODEL.RPN.ASPECT_RATIOS": tuple(aspect_ratios),
            "MODEL.RPN.ANCHOR_SIZES": tuple(anchor_sizes),
            "MODEL.RESNETS.STAGE_WITH_DCN": (False, with_dcn, with_dcn, with_dcn),
            "MODEL.RESNETS.WITH_MODULATED_DCN": with_dcn,
            "MODEL.RPN.CLS_LOSS": rpn_cls_loss,
            "MODEL.RPN.FOCAL_LOSS_ALPHA": rpn_focal_loss_alpha,
            "MODEL.RPN.FOCAL_LOSS_GAMMA": rpn_focal_loss_gamma,
            "MODEL.ROI_BOX_HEAD.BBOX_LOSS": rcnn_bbox_loss,
            "MODEL.ROI_BOX_HEAD.BBOX_LOSS_WEIGHT": 1.0 if rcnn_bbox_loss == "SmoothL1Loss" else 10.0,
            "MODEL.ROI_HEADS.NMS_TYPE": rcnn_nms,
            "MODEL.ROI_HEADS.DETECTIONS_PER_IMG": keep_top_k,
            "MODEL.ROI_HEADS.NMS": nms_threshold,
            "MODEL.ROI_HEADS.SCORE_THRESH": score_threshold,
            "MODEL.ROI_HEADS.SOFT_NMS_SIGMA": softnms_sigma,
            "MODEL.ROI_HEADS.BBOX_ASSIGNER": bbox_assigner,
            "MODEL.RPN.BATCH_SIZE_PER_IMAGE": rpn_batch_size_per_im,
            "MODEL.RPN.POSITIVE_FRACTION": rpn_fg_fraction,
            "MODEL.RPN.PRE_NMS_TOP_N_TEST": test_pre_nms_top_n,
            "MODEL.RPN.FPN_POST_NMS_TOP_N_TEST": test_post_nms_top_n,
            "MODEL.RPN.POST_NMS_TOP_N_TEST": test_post_nms_top_n,
        }
        self._overrides = dict(overrides or {})
        self.cfg = get_config(None, _pairs(COMMON | keys | self._overrides))
        self._predictor: Predictor | None = None

    def train(
        self,
        num_epochs: int,
        train_dataset: Dataset,
        train_batch_size: int = 1,
        eval_dataset: Dataset | None = None,
        save_interval_epochs: int = 1,
        log_interval_steps: int = 20,
        save_dir: str | Path = "output",
        pretrain_weights: str | Path | None = "IMAGENET",
        optimizer: str | None = None,
        learning_rate: float = 1.0 / 800,
        warmup_steps: int = 500,
        warmup_start_lr: float = 1.0 / 2400,
        lr_decay_epochs: Sequence[int] = (8, 11),
        lr_decay_gamma: float = 0.1,
        metric: str | None = None,
        use_vdl: bool = False,
        early_stop: bool = False,
        early_stop_patience: int = 5,
        resume_checkpoint: str | Path | None = None,
    ) -> None:
        """A whole run, as tools/train_net.py makes it; its directory is save_dir. Under torchrun on all ranks.

        Args:
            train_batch_size: images a step over all ranks; evaluation takes as many.
            save_interval_epochs: epochs between checkpoints, and evaluations of eval_dataset.
            pretrain_weights: a file; "IMAGENET" or "COCO": torchvision's file in the cache, and an error that says
                what to put where when it is not there, as nothing is downloaded; None: all weights are fresh, and then
                nothing is frozen and batch norms learn. Layers for another number of classes start fresh.
            optimizer: SGD (also None, momentum .9), AdamW or ApexFusedSGD.
            learning_rate: reached after warmup_steps steps, on a line from warmup_start_lr, and multiplied by
                lr_decay_gamma after each of lr_decay_epochs; those beyond num_epochs do nothing.
            metric: COCO or VOC; None: the eval data set's own. Checkpoints are compared by COCO's AP always.
            use_vdl: write TensorBoard's events to save_dir (PaddleX wrote VisualDL's).
            early_stop: end when early_stop_patience evaluations in a row are no better than the best before.
            resume_checkpoint: a checkpoint to continue from, exactly where it stopped; or a run's directory: its last.

        Raises ConfigError, DataError, CheckpointError, NonFiniteLossError.
        """
        if not train_dataset.shuffle:
            raise ConfigError("train_dataset has shuffle=False, but training takes images in a new order every epoch")
        keys = {
            "SOLVER.MAX_EPOCHS": num_epochs,
            "SOLVER.IMS_PER_BATCH": train_batch_size,
            "SOLVER.SAVE_EPOCHS": save_interval_epochs,
            "LOGGING.PERIOD": log_interval_steps,
            "OUTPUT_DIR": str(save_dir),
            **self._weights_keys(pretrain_weights),
            "SOLVER.OPTIMIZER": optimizer or "SGD",
            "SOLVER.BASE_LR": learning_rate,
            "SOLVER.WARMUP_ITERS": warmup_steps,
            "SOLVER.WARMUP_FACTOR": warmup_start_lr / learning_rate,
            "SOLVER.STEPS": tuple(epoch for epoch in lr_decay_epochs if epoch < num_epochs),
            "SOLVER.GAMMA": lr_decay_gamma,
            "LOGGING.TENSORBOARD": use_vdl,
            "SOLVER.EARLY_STOP_PATIENCE": early_stop_patience if early_stop else 0,
            "DATASETS.TEST": (),
            **(test_data_keys(eval_dataset, train_batch_size, metric) if eval_dataset else {}),
            **train_data_keys(train_dataset),
        }
        if eval_dataset and eval_dataset.data_dir != train_dataset.data_dir:
            raise ConfigError("train_dataset and eval_dataset have different data_dir: give full paths in their names")
        cfg = self._configured(keys, eval_dataset.transforms if eval_dataset else None)
        device = get_device(cfg.MODEL.DEVICE)
        with distributed.process_group(device):
            setup_logging(prepare_output(cfg), distributed.rank(), cfg.LOGGING.RANK_LOGS)
            run = run_training(cfg, device, resume=_resumed(resume_checkpoint))
        names = dict(zip(run.dataset.category_ids, run.dataset.category_names))
        limbs = [list(limb) for limb in run.dataset.skeleton.limbs] if run.dataset.skeleton else []
        self._predictor = Predictor(cfg, device, run.model.eval(), run.dataset.category_ids, names, limbs)
        self.cfg = cfg

    def evaluate(
        self,
        eval_dataset: Dataset,
        batch_size: int = 1,
        epoch_id: int | None = None,
        metric: str | None = None,
        return_details: bool = False,
    ) -> OrderedDict[str, float | None] | tuple[OrderedDict[str, float | None], dict[str, list]]:
        """The model's accuracy, as fractions in 0..1 (PaddleX's VOC counts to 100), None where nothing can be found.

        metric COCO: bbox_mmap and, of MaskRCNN, segm_mmap: AP over IoU .5 to .95. VOC: bbox_map, AP50 of VOC 2007, and
        of MaskRCNN segm_map, COCO's AP50 of masks, for VOC defines none (PaddleX has the same).
        epoch_id: for the log. return_details: also {"bbox": [[image id, category id, [xmin, ymin, w, h], score]],
        "mask": [[image id, category id, [H, W] uint8 of 0 and 1, score]], "gt": annotations in COCO's form}.
        """
        predictor = self._trained("evaluate")
        keys = test_data_keys(eval_dataset, batch_size, metric)
        cfg = self._configured(keys | {"LOGGING.PREDICTION_IMAGES": 0}, eval_dataset.transforms)
        with distributed.process_group(predictor.device), tempfile.TemporaryDirectory() as directory:
            tests = test_datasets(cfg)
            scores = evaluate_model(cfg, predictor.device, predictor.model, tests, Path(directory))
            metrics = accuracy(scores, metric or eval_dataset.metric)
            logger.info("evaluated%s: %s", "" if epoch_id is None else f" epoch {epoch_id}", dict(metrics))
            if not return_details:
                return metrics
            (dataset,) = tests.values()
            return metrics, distributed.from_main(lambda: details_of(dataset, Path(directory) / "inference"))

    def predict(self, img_file: str | Path | np.ndarray, transforms: Sequence[Spec] | None = None) -> list[Spec]:
        """The objects of an image file, or of an array [H, W, 3] uint8 in the order blue, green, red, as cv2 reads it.

        transforms: as for evaluation; None: those of the model. Returns by falling score dicts of bbox
        [xmin, ymin, w, h] in pixels of the image, category (name), category_id (the data set's own), score (0..1), and
        of MaskRCNN mask [H, W] uint8 of 0 and 1.
        """
        return self.batch_predict([img_file], transforms)[0]

    def batch_predict(
        self, img_file_list: Sequence[str | Path | np.ndarray], transforms: Sequence[Spec] | None = None
    ) -> list[list[Spec]]:
        """`predict` of several images, which go through the model together."""
        predictor = self._trained("predict")
        if transforms is not None:
            predictor = replace(predictor, cfg=self._configured(eval_keys(transforms), transforms))
        pictures = [_as_rgb(image) for image in img_file_list]
        found = detect_images(predictor, pictures) if pictures else []
        return [[_described(result, predictor.category_names) for result in results] for results in found]

    def save(self, path: str | Path) -> None:
        """The trained model with configuration and class names in one file, which `load`, tools/predict.py and
        pretrain_weights take."""
        save_predictor(self._trained("save"), Path(path))

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> FasterRCNN:
        """A model from a file of `save`, or from a run's model_*.pth. Raises CheckpointError.

        `train` starts from its pretrain_weights nevertheless: give it the file to go on from here.
        """
        predictor = load_predictor(Path(path), get_device(device))
        if cls.masks != predictor.cfg.MODEL.MASK_ON:
            right = "MaskRCNN" if predictor.cfg.MODEL.MASK_ON else "FasterRCNN"
            raise CheckpointError(f"{path} is not a {cls.__name__}: take {right}.load")
        model = cls(overrides={"MODEL.DEVICE": device})
        model.cfg, model._predictor = predictor.cfg, predictor
        return model

    def _configured(self, keys: Mapping[str, Any], eval_transforms: Sequence[Spec] | None) -> CfgNode:
        """The model's configuration with these keys. Raises ConfigError, also where transforms for evaluation or
        prediction normalize otherwise than it."""
        cfg = parse_config(dump(self.cfg), "the model", _pairs({**keys, **self._overrides}))
        for transform in known_transforms.build(list(eval_transforms or [])):
            if isinstance(transform, known_transforms.Normalize):
                transform.check(cfg)
        return cfg

    def _weights_keys(self, weights: str | Path | None) -> dict[str, Any]:
        if weights is None:
            return {
                "MODEL.WEIGHT": "",
                "MODEL.BACKBONE.FREEZE_CONV_BODY_AT": 0,
                "MODEL.RESNETS.NORM": "BN",
            }
        return {
            "MODEL.WEIGHT": self._named_weights(weights) if weights in ("IMAGENET", "COCO") else str(weights),
            "MODEL.REPLACE_HEADS": True,
            "MODEL.BACKBONE.FREEZE_CONV_BODY_AT": 2,
            "MODEL.RESNETS.NORM": "FrozenBN",
        }

    def _named_weights(self, name: str) -> str:
        """torchvision's weights in the catalogue of models/weights.py."""
        body = self.cfg.MODEL.BACKBONE.CONV_BODY
        form = parse(body)
        if name == "COCO" and body == "R-50-FPN":
            return f"catalog://{self.coco_weights}"
        address = f"torchvision/resnet{form.depth}"
        if name == "COCO" or form.vd or form.width or address not in CATALOG:
            raise ConfigError(f"no {name} weights are known for {body}: give pretrain_weights a file, or None for none")
        return f"catalog://{address}"

    def _trained(self, what: str) -> Predictor:
        if self._predictor is None:
            raise ConfigError(f"there is nothing to {what}: call train first, or {type(self).__name__}.load")
        return self._predictor


class MaskRCNN(FasterRCNN):
    """Mask R-CNN: FasterRCNN that predicts masks too, with the same parameters."""

    masks = True
    coco_weights = "torchvision/maskrcnn_resnet50_fpn_coco"


def body_keys(backbone: str, with_fpn: bool, fpn_channels: int, input_channels: int) -> dict[str, Any]:
    """The backbone and what follows from it."""
    if not isinstance(backbone, str) or backbone not in BACKBONES:
        raise ConfigError(
            f"backbone is {backbone!r}; known are {', '.join(BACKBONES)}. With a module of your own build"
            " models.rcnn.RCNN(backbone=...), as docs/models.md shows"
        )
    body = BACKBONES[backbone]
    grey = sum(_MEAN) / 3, sum(_STD) / 3  # of further channels
    mean, std = ([*values, *[more] * input_channels][:input_channels] for values, more in zip((_MEAN, _STD), grey))
    channels = fpn_channels if with_fpn else (256 if body == "R-18" else 1024)
    return {
        **(FPN if with_fpn else {}),
        "MODEL.BACKBONE.CONV_BODY": f"{body}-{'FPN' if with_fpn else 'C4'}",
        "MODEL.RESNETS.BACKBONE_OUT_CHANNELS": channels,
        "INPUT.PIXEL_MEAN": mean,
        "INPUT.PIXEL_STD": std,
    }


def train_data_keys(dataset: Dataset) -> dict[str, Any]:
    specs = dataset.transforms
    return {
        "DATASETS.TRAIN": (dataset.name,),
        "DATA.PATH": dataset.data_dir,
        "DATALOADER.NUM_WORKERS": dataset.num_workers,
        "INPUT.TRANSFORMS": list(specs or []),
        **normalize_keys(specs or []),
    }


def test_data_keys(dataset: Dataset, batch_size: int, metric: str | None) -> dict[str, Any]:
    """metric: a key of METRICS, or None for the data set's own."""
    metric = metric or dataset.metric
    if metric not in METRICS:
        raise ConfigError(f"metric is {metric!r}; known are {', '.join(METRICS)}")
    return {
        "DATASETS.TEST": (dataset.name,),
        "DATA.PATH": dataset.data_dir,
        "DATALOADER.NUM_WORKERS": dataset.num_workers,
        "TEST.IMS_PER_BATCH": batch_size,
        "TEST.METRICS": METRICS[metric],
        **eval_keys(dataset.transforms),
    }


test_data_keys.__test__ = False  # pytest would take it for a test


def accuracy(scores: Mapping[str, Any], metric: str) -> OrderedDict[str, float | None]:
    """PaddleX's names of the scores."""
    if metric == "VOC":
        masks = {"segm_map": scores["segm"]["AP50"]} if "segm" in scores else {}
        return OrderedDict(bbox_map=scores["voc07"]["AP50"], **masks)
    return OrderedDict((f"{task}_mmap", scores[task]["AP"]) for task in ("bbox", "segm") if task in scores)


def details_of(dataset: AnyDataset, directory: Path) -> dict[str, list]:
    """evaluate's details, of the results that an evaluation wrote to the directory."""
    results = load_results(min(directory.glob("*.json")))  # NAME.json; NAME_details.json is the other
    rows = [(r["image_id"], r["category_id"], r) for r in results]
    return {
        "bbox": [[image, category, r["bbox"], r["score"]] for image, category, r in rows],
        "mask": [
            [image, category, decode_rle(r["segmentation"]).astype(np.uint8), r["score"]]
            for image, category, r in rows
            if "segmentation" in r
        ],
        "gt": [annotation for index in range(len(dataset)) for annotation in dataset.annotations(index)],
    }


def visualize(
    image: str | Path | np.ndarray, result: Sequence[Spec], threshold: float = 0.5, save_dir: str | Path | None = "./"
) -> np.ndarray:
    """The image with what `predict` found drawn on it: [H, W, 3] uint8, blue, green, red.

    image: as for `predict`. threshold: least score drawn. save_dir: where visualize_NAME.png is written, NAME being the
    file's, or "image" of an array; None: nowhere.
    """
    shown = [entry for entry in result if entry["score"] >= threshold]
    boxes = np.array([entry["bbox"] for entry in shown], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    names, scores = ([entry[key] for entry in shown] for key in ("category", "score"))
    picture = draw(_as_rgb(image), boxes, names, scores, [entry.get("mask") for entry in shown])[..., ::-1]
    if save_dir is not None:
        directory = Path(save_dir)
        directory.mkdir(parents=True, exist_ok=True)
        name = "image" if isinstance(image, np.ndarray) else Path(image).name
        _, png = cv2.imencode(".png", picture)
        checkpoint.write_atomically(directory / f"visualize_{name}.png", lambda file: file.write(png.tobytes()))
    return picture


def _as_rgb(image: str | Path | np.ndarray) -> np.ndarray:
    if not isinstance(image, np.ndarray):
        return read_image(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"an image must be a file or [H, W, 3] uint8 (BGR), not {image.shape} {image.dtype}")
    return np.ascontiguousarray(image[..., ::-1])


def _described(result: Spec, names: Mapping[int, str]) -> Spec:
    category = result["category_id"]
    entry = {"bbox": result["bbox"], "category": names[category], "category_id": category, "score": result["score"]}
    if "segmentation" in result:
        entry["mask"] = decode_rle(result["segmentation"]).astype(np.uint8)
    return entry


def _resumed(place: str | Path | None) -> Path | bool:
    """What run_training takes for resume_checkpoint. Raises CheckpointError: a directory without a checkpoint."""
    if place is None:
        return False
    found = checkpoint.last(Path(place)) if Path(place).is_dir() else Path(place)
    if found is None:
        raise CheckpointError(f"resume_checkpoint {place} holds no {checkpoint.LAST}: it is no run's directory")
    return found


def _pairs(keys: Mapping[str, Any]) -> list[Any]:
    return [entry for pair in keys.items() for entry in pair]
