"""Cascade Mask R-CNN with AugFPN on outlines drawn in the VGG Image Annotator (VIA).

    python docs/tutorials/balloons.py

MMDetection's recipe for the balloons, whose pictures are drawn here so that nothing is downloaded. This has the
parts of configs/cascade_mask_rcnn_R_50_AugFPN_balloon.yaml, which tools/train_net.py runs on the real ones, narrow and
small: one CPU core needs less than a minute.
"""

import json
import os
import shutil

import maskrcnn_benchmark as mb
from maskrcnn_benchmark import transforms
from maskrcnn_benchmark.data.synthetic import generate


# 1. The data set: pictures and via_region_data.json, in which regions have an outline and, here, no class
def draw_balloons():
    generate("shapes", train_images=20, val_images=6, size=(128, 128), seed=2, objects=(1, 3))
    for split in ("train", "val"):
        shutil.copytree(f"shapes/{split}2017", f"balloon/{split}")
        with open(f"shapes/annotations/instances_{split}2017.json") as file:
            content = json.load(file)
        entries = {}
        for image in content["images"]:
            regions = {}
            for annotation in (a for a in content["annotations"] if a["image_id"] == image["id"]):
                outline = annotation["segmentation"][0]
                shape = {"name": "polygon", "all_points_x": outline[::2], "all_points_y": outline[1::2]}
                regions[str(len(regions))] = {"region_attributes": {}, "shape_attributes": shape}
            size = os.path.getsize(f"balloon/{split}/{image['file_name']}")
            entry = {"base64_img_data": "", "file_attributes": {}, "filename": image["file_name"], "fileref": ""}
            entries[f"{image['file_name']}{size}"] = entry | {"regions": regions, "size": size}
        with open(f"balloon/{split}/via_region_data.json", "w") as file:
            json.dump(entries, file)


draw_balloons()

# 2. The training pipeline, with AutoAugment
grey = (124, 116, 104)
train_pipeline = transforms.Compose([
    transforms.AutoAugment(policies=[
        [transforms.Rotate(level=5, img_fill_val=grey, prob=0.5, scale=1)],
        [transforms.Rotate(level=7, img_fill_val=grey), transforms.Translate(level=5, prob=0.5, img_fill_val=grey)],
    ]),
    transforms.Resize(img_scale=[(256, 112), (256, 128)], keep_ratio=True),
    transforms.RandomFlip(flip_ratio=0.5),
    transforms.Normalize(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
    transforms.Pad(size_divisor=32),
])  # fmt: skip
test_pipeline = transforms.Compose([transforms.ResizeByShort(short_size=128, max_size=256)])

train_dataset = mb.datasets.Dataset("via://balloon/train/via_region_data.json?category=balloon", train_pipeline)
val_dataset = mb.datasets.Dataset("via://balloon/val/via_region_data.json?category=balloon", test_pipeline)

# 3. The model: a cascade of three stages with a mask head each, one box regression for all classes, and AugFPN's parts
CASCADE = {
    "MODEL.CASCADE_ON": True,
    "MODEL.CLS_AGNOSTIC_BBOX_REG": True,
    "MODEL.ROI_BOX_CASCADE_HEAD.SCORE_AVERAGE": "logits",
    "MODEL.ROI_MASK_HEAD.PER_STAGE": True,
    "MODEL.AUG_FPN.RESIDUAL_AUGMENTATION": True,
    "MODEL.AUG_FPN.CONSISTENT_SUPERVISION": True,
    "MODEL.AUG_FPN.SOFT_ROI_SELECTION": True,
}
NARROW = {
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.FPN.USE_GN": True,
    "MODEL.GROUP_NORM.NUM_GROUPS": 8,
    "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN": 100,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM": 64,
    "MODEL.ROI_MASK_HEAD.CONV_LAYERS": (32,),
    "SOLVER.CLIP_GRADIENTS_NORM": 5.0,
}
model = mb.MaskRCNN(
    num_classes=2,  # the background and balloons
    backbone="ResNet18",
    anchor_sizes=[8, 16, 32, 64, 128],
    fpn_num_channels=32,
    rpn_batch_size_per_im=64,
    test_pre_nms_top_n=200,
    test_post_nms_top_n=50,
    overrides=CASCADE | NARROW,
)

# 4. Training, which ends early when three evaluations in a row bring nothing
model.train(
    num_epochs=10,
    train_dataset=train_dataset,
    train_batch_size=4,
    eval_dataset=val_dataset,
    save_interval_epochs=2,
    log_interval_steps=5,
    pretrain_weights=None,
    optimizer="AdamW",
    learning_rate=0.002,
    warmup_steps=5,
    warmup_start_lr=0.0001,
    lr_decay_epochs=[8],
    early_stop=True,
    early_stop_patience=3,
    save_dir="output/balloon",
)

# 5. Test, and pictures of every balloon found
print("metrics:", model.evaluate(val_dataset, batch_size=2))
pictures = sorted(os.path.join("balloon/val", name) for name in os.listdir("balloon/val") if name.endswith(".jpg"))
for picture, found in zip(pictures, model.batch_predict(pictures)):
    mb.visualize(picture, found, threshold=0.3, save_dir="output/balloon/drawn")
