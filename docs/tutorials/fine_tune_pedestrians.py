"""Fine-tune a trained Mask R-CNN on pictures with mask images, and put another backbone into the detector.

    python docs/tutorials/fine_tune_pedestrians.py

torchvision's tutorial on the Penn-Fudan pedestrians. Their pictures are drawn here, and the model to start from is
trained for a moment first, so that nothing is downloaded; it is narrow, so that one CPU core needs less than a minute.
"""

import json
import os

import cv2
import numpy as np
import torch
from PIL import Image

import maskrcnn_benchmark as mb
from maskrcnn_benchmark import transforms
from maskrcnn_benchmark.data.synthetic import generate
from maskrcnn_benchmark.models.anchors import AnchorGenerator
from maskrcnn_benchmark.models.box_head import BoxHead, BoxPredictor, MLPFeatureExtractor
from maskrcnn_benchmark.models.rcnn import RCNN, Normalize
from maskrcnn_benchmark.models.roi_pool import RoIPool
from maskrcnn_benchmark.models.rpn import RPN, RPNHead
from maskrcnn_benchmark.structures import ImageBatch, Targets


# 1. The data set: a class as torchvision's tutorial has it, unchanged
class PennFudanDataset:
    def __init__(self, root, transforms):
        self.root = root
        self.transforms = transforms
        self.imgs = sorted(os.listdir(os.path.join(root, "PNGImages")))
        self.masks = sorted(os.listdir(os.path.join(root, "PedMasks")))

    def __getitem__(self, idx):
        img = Image.open(os.path.join(self.root, "PNGImages", self.imgs[idx])).convert("RGB")
        mask = np.array(Image.open(os.path.join(self.root, "PedMasks", self.masks[idx])))
        obj_ids = np.unique(mask)[1:]  # 0 is the background
        masks = mask == obj_ids[:, None, None]
        boxes = []
        for i in range(len(obj_ids)):
            pos = np.where(masks[i])
            boxes.append([np.min(pos[1]), np.min(pos[0]), np.max(pos[1]), np.max(pos[0])])
        boxes = torch.as_tensor(np.array(boxes), dtype=torch.float32)
        target = {
            "boxes": boxes,
            "labels": torch.ones((len(obj_ids),), dtype=torch.int64),
            "masks": torch.as_tensor(masks, dtype=torch.uint8),
            "image_id": torch.tensor([idx]),
            "area": (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 2] - boxes[:, 0]),
            "iscrowd": torch.zeros((len(obj_ids),), dtype=torch.int64),
        }
        if self.transforms is not None:
            img, target = self.transforms(img, target)
        return img, target

    def __len__(self):
        return len(self.imgs)


def draw_data(root):
    """PNGImages/ and PedMasks/ as in PennFudanPed: in a mask image each object has a number from 1."""
    generate("shapes", train_images=24, val_images=8, size=(96, 96), seed=1, objects=(1, 3))
    for directory in ("PNGImages", "PedMasks"):
        os.makedirs(os.path.join(root, directory))
    with open("shapes/annotations/instances_train2017.json") as file:
        content = json.load(file)
    for image in content["images"]:
        mask = np.zeros((image["height"], image["width"]), np.uint8)
        objects = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        for number, annotation in enumerate(objects, start=1):
            outlines = [np.reshape(points, (-1, 2)).astype(np.int32) for points in annotation["segmentation"]]
            cv2.fillPoly(mask, outlines, number)
        picture = cv2.imread(os.path.join("shapes/train2017", image["file_name"]))
        cv2.imwrite(os.path.join(root, "PNGImages", f"{image['id']:03d}.png"), picture)
        cv2.imwrite(os.path.join(root, "PedMasks", f"{image['id']:03d}_mask.png"), mask)


# 2. Transforms: flips in training alone. Tensors and normalising are the package's own work
def get_transform(train):
    chosen = [transforms.ResizeByShort(short_size=96, max_size=96)]
    if train:
        chosen.append(transforms.RandomHorizontalFlip(0.5))
    return transforms.Compose(chosen)


# 3. The model. num_classes counts the background
NARROW = {
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.FPN.USE_GN": True,
    "MODEL.GROUP_NORM.NUM_GROUPS": 8,
    "MODEL.BACKBONE.FREEZE_CONV_BODY_AT": 0,
    "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN": 100,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM": 128,
    "MODEL.ROI_MASK_HEAD.CONV_LAYERS": (32, 32),
}


def get_model_instance_segmentation(num_classes):
    return mb.MaskRCNN(
        num_classes=num_classes,
        backbone="ResNet18",
        anchor_sizes=[8, 16, 32, 64, 128],
        fpn_num_channels=32,
        rpn_batch_size_per_im=64,
        test_pre_nms_top_n=200,
        test_post_nms_top_n=100,
        overrides=NARROW,
    )


def train_base_model():
    """Stands for a published model of other classes; with the network at hand, pretrain_weights="COCO" is that."""
    dataset = mb.datasets.CocoDetection(
        "shapes/train2017", "shapes/annotations/instances_train2017.json", get_transform(train=True)
    )
    model = get_model_instance_segmentation(len(dataset.labels))
    model.train(
        num_epochs=6,
        train_dataset=dataset,
        train_batch_size=4,
        save_dir="output/base",
        save_interval_epochs=6,
        pretrain_weights=None,
        optimizer="AdamW",
        learning_rate=0.002,
        warmup_steps=5,
        warmup_start_lr=0.0001,
    )
    model.save("base.pth")


# 4. Another backbone: any module that gives a list of maps
class Features(torch.nn.Sequential):
    def forward(self, x):
        return [super().forward(x)]


def build_with_own_backbone():
    """Faster R-CNN on one map of stride 8, with 5 x 3 anchors at each of its places."""
    layers = [torch.nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in ((3, 16), (16, 32), (32, 64))]
    backbone = Features(*(part for layer in layers for part in (layer, torch.nn.ReLU())))
    anchors = AnchorGenerator(sizes=((16, 32, 48, 64, 96),), aspect_ratios=(0.5, 1.0, 2.0), strides=(8,))
    extractor = MLPFeatureExtractor(in_channels=64, resolution=7, hidden=128)
    return RCNN(
        normalize=Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), bgr255=False),
        backbone=backbone,
        rpn=RPN(RPNHead(64, anchors.per_position), anchors, pre_nms=(500, 200), post_nms=(100, 100)),
        box_head=BoxHead(RoIPool((1 / 8,), 7, 2, True), extractor, BoxPredictor(128, classes=2)),
    )


def try_own_backbone(dataset):
    """Its losses on one image, which are there to be differentiated, and its detections."""
    image, target = dataset[0]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    sizes = torch.tensor([pixels.shape[2:]])
    images = ImageBatch(pixels, sizes, [tuple(pixels.shape[2:])], [0])
    valid = torch.ones(1, len(target["labels"]), dtype=torch.bool)
    model = build_with_own_backbone()
    losses = model(images, Targets(target["boxes"][None], target["labels"][None], valid))
    sum(losses.values()).backward()
    print("own backbone:", {name: round(loss.item(), 3) for name, loss in losses.items()})
    with torch.no_grad():
        print("own backbone:", int(model.eval()(images).valid.sum()), "detections before training")


# 5. All together
def main():
    draw_data("PennFudanPed")
    train_base_model()

    # The last images are for the test. A class in this file is __main__:Class; it gets data_dir as its root
    data = {"data_dir": "PennFudanPed", "num_workers": 0}
    dataset = mb.datasets.Dataset("__main__:PennFudanDataset[:-6]", get_transform(train=True), **data)
    dataset_test = mb.datasets.Dataset("__main__:PennFudanDataset[-6:]", get_transform(train=False), **data)

    # Two classes, background and person: the layers of the base model's six classes are replaced by fresh ones
    model = get_model_instance_segmentation(num_classes=2)
    model.train(
        num_epochs=10,
        train_dataset=dataset,
        train_batch_size=2,
        eval_dataset=dataset_test,
        save_interval_epochs=5,
        log_interval_steps=10,
        pretrain_weights="base.pth",
        optimizer="AdamW",
        learning_rate=0.001,
        warmup_steps=10,
        warmup_start_lr=0.0001,
        lr_decay_epochs=[6, 9],
        save_dir="output/pedestrians",
    )
    print("metrics:", model.evaluate(dataset_test))
    prediction = model.predict("PennFudanPed/PNGImages/024.png")
    mb.visualize("PennFudanPed/PNGImages/024.png", prediction, threshold=0.5, save_dir="output/pedestrians")
    try_own_backbone(PennFudanDataset("PennFudanPed", None))
    print("That's it!")


if __name__ == "__main__":
    main()
