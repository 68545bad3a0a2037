"""Train an instance segmentation model, from images and a COCO file to pictures with masks.

    python docs/tutorials/train_mask_rcnn.py

PaddleX's tutorial of Mask R-CNN, step by step. Its data set is drawn here, so that nothing is downloaded, and the model
is narrow, so that one CPU core trains it in under a minute. For data of your own take short_size=800,
backbone="ResNet50" and pretrain_weights="COCO", and leave out `NARROW`, the numbers of channels, anchors and proposals,
and `optimizer`.
"""

import maskrcnn_benchmark as mb
from maskrcnn_benchmark import transforms
from maskrcnn_benchmark.data.synthetic import generate

# 1. A data set: shapes in five classes, in the layout of COCO 2017
generate("shapes", train_images=32, val_images=8, size=(128, 128), seed=0, objects=(1, 3))

# 2. What is done to images in training and in evaluation. Padding to a multiple of 32 lets the pyramid add its maps
train_transforms = transforms.Compose([
    transforms.RandomHorizontalFlip(),
    transforms.Normalize(),
    transforms.ResizeByShort(short_size=128, max_size=1333),
    transforms.Padding(coarsest_stride=32),
])  # fmt: skip
eval_transforms = transforms.Compose([
    transforms.Normalize(),
    transforms.ResizeByShort(short_size=128, max_size=1333),
    transforms.Padding(coarsest_stride=32),
])  # fmt: skip

# 3. The data sets that are read, with their transforms
train_dataset = mb.datasets.CocoDetection(
    data_dir="shapes/train2017",
    ann_file="shapes/annotations/instances_train2017.json",
    transforms=train_transforms,
    shuffle=True,
)
eval_dataset = mb.datasets.CocoDetection(
    data_dir="shapes/val2017", ann_file="shapes/annotations/instances_val2017.json", transforms=eval_transforms
)

# 4. The model. num_classes counts the background, as labels does: 5 classes, and so 6
NARROW = {
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.FPN.USE_GN": True,
    "MODEL.GROUP_NORM.NUM_GROUPS": 8,
    "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN": 100,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM": 128,
    "MODEL.ROI_MASK_HEAD.CONV_LAYERS": (32, 32),
}
num_classes = len(train_dataset.labels)
model = mb.MaskRCNN(
    num_classes=num_classes,
    backbone="ResNet18",
    anchor_sizes=[8, 16, 32, 64, 128],
    fpn_num_channels=32,
    rpn_batch_size_per_im=64,
    test_pre_nms_top_n=200,
    test_post_nms_top_n=100,
    overrides=NARROW,
)

# Every save_interval_epochs a checkpoint is written to save_dir, and the model is evaluated. With use_vdl=True
# `tensorboard --logdir output/mask_rcnn` shows the curves
model.train(
    num_epochs=12,
    train_dataset=train_dataset,
    train_batch_size=4,
    eval_dataset=eval_dataset,
    save_interval_epochs=4,
    log_interval_steps=8,
    pretrain_weights=None,
    optimizer="AdamW",
    learning_rate=0.004,
    warmup_steps=10,
    warmup_start_lr=0.0001,
    lr_decay_epochs=[8, 11],
    save_dir="output/mask_rcnn",
    use_vdl=True,
)

# 5. Evaluate, predict, draw
eval_metrics = model.evaluate(eval_dataset, batch_size=1)
print("eval_metrics:", eval_metrics)

predict_result = model.predict("shapes/val2017/000000000001.jpg")
print(f"{len(predict_result)} objects; the first:", {k: v for k, v in predict_result[0].items() if k != "mask"})

mb.visualize("shapes/val2017/000000000001.jpg", predict_result, threshold=0.2, save_dir="output/mask_rcnn")
