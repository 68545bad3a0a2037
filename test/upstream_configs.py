"""What the yamls of maskrcnn-benchmark (commit 57eec25) say, as a table of facts: for each file the blocks of keys that
it is made of, in upstream's spelling. FBNet's are apart."""

from __future__ import annotations

import yaml

MSRA = "catalog://ImageNetPretrained/MSRA/"
X101 = "catalog://ImageNetPretrained/FAIR/20171220/X-101-32x8d"

# KEY=value, without spaces
BLOCKS = {
    "fpn": "MODEL.RESNETS.BACKBONE_OUT_CHANNELS=256 MODEL.RPN.USE_FPN=True MODEL.RPN.ANCHOR_STRIDE=(4,8,16,32,64) "
    "DATALOADER.SIZE_DIVISIBILITY=32",
    "proposals": "MODEL.RPN.PRE_NMS_TOP_N_TRAIN=2000 MODEL.RPN.PRE_NMS_TOP_N_TEST=1000 "
    "MODEL.RPN.POST_NMS_TOP_N_TEST=1000 MODEL.RPN.FPN_POST_NMS_TOP_N_TEST=1000",
    "box": "MODEL.ROI_HEADS.USE_FPN=True MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION=7 "
    "MODEL.ROI_BOX_HEAD.POOLER_SCALES=(0.25,0.125,0.0625,0.03125) MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO=2 "
    "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR=FPN2MLPFeatureExtractor MODEL.ROI_BOX_HEAD.PREDICTOR=FPNPredictor",
    "mask": "MODEL.ROI_MASK_HEAD.POOLER_SCALES=(0.25,0.125,0.0625,0.03125) "
    "MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR=MaskRCNNFPNFeatureExtractor "
    "MODEL.ROI_MASK_HEAD.PREDICTOR=MaskRCNNC4Predictor MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION=14 "
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO=2 MODEL.ROI_MASK_HEAD.RESOLUTION=28 "
    "MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR=False MODEL.MASK_ON=True",
    "keypoint": "MODEL.ROI_BOX_HEAD.NUM_CLASSES=2 MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES=(0.25,0.125,0.0625,0.03125) "
    "MODEL.ROI_KEYPOINT_HEAD.FEATURE_EXTRACTOR=KeypointRCNNFeatureExtractor "
    "MODEL.ROI_KEYPOINT_HEAD.PREDICTOR=KeypointRCNNPredictor MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION=14 "
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO=2 MODEL.ROI_KEYPOINT_HEAD.RESOLUTION=56 "
    "MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR=False MODEL.KEYPOINT_ON=True "
    "INPUT.MIN_SIZE_TRAIN=(640,672,704,736,768,800)",
    "c4": "MODEL.RPN.PRE_NMS_TOP_N_TEST=6000 MODEL.RPN.POST_NMS_TOP_N_TEST=1000",
    "c4mask": "MODEL.ROI_MASK_HEAD.PREDICTOR=MaskRCNNC4Predictor "
    "MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR=True MODEL.MASK_ON=True",
    "x": "MODEL.RESNETS.STRIDE_IN_1X1=False MODEL.RESNETS.NUM_GROUPS=32 MODEL.RESNETS.WIDTH_PER_GROUP=8",
    "rpn": "MODEL.RPN_ONLY=True MODEL.RPN.PRE_NMS_TOP_N_TEST=1000 MODEL.RPN.POST_NMS_TOP_N_TEST=2000 "
    "MODEL.RPN.FPN_POST_NMS_TOP_N_TEST=2000",
    "retina": "MODEL.RPN_ONLY=True MODEL.RETINANET_ON=True MODEL.RPN.FG_IOU_THRESHOLD=0.5 "
    "MODEL.RPN.BG_IOU_THRESHOLD=0.4 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE=256 MODEL.RETINANET.SCALES_PER_OCTAVE=3 "
    "MODEL.RETINANET.STRADDLE_THRESH=-1 MODEL.RETINANET.FG_IOU_THRESHOLD=0.5 MODEL.RETINANET.BG_IOU_THRESHOLD=0.4",
    "sizes": "INPUT.MIN_SIZE_TRAIN=(800,) INPUT.MAX_SIZE_TRAIN=1333 INPUT.MIN_SIZE_TEST=800 INPUT.MAX_SIZE_TEST=1333",
    "batches": "SOLVER.IMS_PER_BATCH=16 TEST.IMS_PER_BATCH=8",
    "gn": "MODEL.RESNETS.STRIDE_IN_1X1=False MODEL.RESNETS.TRANS_FUNC=BottleneckWithGN "
    "MODEL.RESNETS.STEM_FUNC=StemWithGN MODEL.FPN.USE_GN=True MODEL.ROI_BOX_HEAD.USE_GN=True "
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE=512 MODEL.ROI_HEADS.POSITIVE_FRACTION=0.25",
    "gnmask": "MODEL.ROI_MASK_HEAD.USE_GN=True MODEL.ROI_MASK_HEAD.CONV_LAYERS=(256,256,256,256)",
    "xconv": "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR=FPNXconv1fcFeatureExtractor MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM=256 "
    "MODEL.ROI_BOX_HEAD.NUM_STACKED_CONVS=4",
    "dcn": "MODEL.RESNETS.STAGE_WITH_DCN=(False,True,True,True) MODEL.RESNETS.WITH_MODULATED_DCN=False "
    "MODEL.RESNETS.DEFORMABLE_GROUPS=1",
    "mdcn": "MODEL.RESNETS.WITH_MODULATED_DCN=True",
    "frozen0": "MODEL.BACKBONE.FREEZE_CONV_BODY_AT=0",
    "coco": "DATASETS.TRAIN=('coco_2014_train','coco_2014_valminusminival') DATASETS.TEST=('coco_2014_minival',)",
    "people": "DATASETS.TRAIN=('keypoints_coco_2014_train','keypoints_coco_2014_valminusminival',) "
    "DATASETS.TEST=('keypoints_coco_2014_minival',)",
    "test": "DATASETS.TEST=('coco_2014_minival',)",
    "16": "SOLVER.BASE_LR=0.02 SOLVER.WEIGHT_DECAY=0.0001 SOLVER.STEPS=(60000,80000) SOLVER.MAX_ITER=90000",
    "8": "SOLVER.BASE_LR=0.01 SOLVER.WEIGHT_DECAY=0.0001 SOLVER.STEPS=(120000,160000) SOLVER.MAX_ITER=180000 "
    "SOLVER.IMS_PER_BATCH=8",
    "3x": "SOLVER.BASE_LR=0.02 SOLVER.WEIGHT_DECAY=0.0001 SOLVER.STEPS=(210000,250000) SOLVER.MAX_ITER=270000",
    "quick": "SOLVER.BASE_LR=0.005 SOLVER.WEIGHT_DECAY=0.0001 SOLVER.STEPS=(1500,) SOLVER.MAX_ITER=2000 "
    "SOLVER.IMS_PER_BATCH=4 TEST.IMS_PER_BATCH=2 INPUT.MIN_SIZE_TRAIN=(600,) INPUT.MAX_SIZE_TRAIN=1000 "
    "INPUT.MIN_SIZE_TEST=800 INPUT.MAX_SIZE_TEST=1000 DATASETS.TRAIN=('coco_2014_minival',) "
    "DATASETS.TEST=('coco_2014_minival',)",
    "256": "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE=256",
    "two": "SOLVER.IMS_PER_BATCH=2",
    "voc": "MODEL.RPN.PRE_NMS_TOP_N_TEST=6000 MODEL.RPN.POST_NMS_TOP_N_TEST=300 MODEL.RPN.ANCHOR_SIZES=(128,256,512) "
    "MODEL.ROI_BOX_HEAD.NUM_CLASSES=21 DATASETS.TRAIN=('voc_2007_trainval',) DATASETS.TEST=('voc_2007_test',) "
    "SOLVER.WEIGHT_DECAY=0.0001",
    "city": "SOLVER.BASE_LR=0.01 SOLVER.WEIGHT_DECAY=0.0001 SOLVER.STEPS=(18000,) SOLVER.MAX_ITER=24000",
    "large": "INPUT.MIN_SIZE_TRAIN=(800,832,864,896,928,960,992,1024,1024) INPUT.MAX_SIZE_TRAIN=2048 "
    "INPUT.MIN_SIZE_TEST=1024 INPUT.MAX_SIZE_TEST=2048 SOLVER.IMS_PER_BATCH=8 MODEL.ROI_BOX_HEAD.NUM_CLASSES=11",
}
FASTER, MASK = "fpn proposals box", "fpn proposals box mask"
CITY = "cityscapes_fine_instanceonly_seg"


def body(name: str, weight: str | None = None) -> str:
    """CONV_BODY, and the ImageNet weights of the network where no others are named."""
    weight = MSRA + "-".join(name.split("-")[:2]) if weight is None else weight
    return f"MODEL.BACKBONE.CONV_BODY={name} MODEL.WEIGHT={weight}"


def datasets(train: str, test: str) -> str:
    return f"DATASETS.TRAIN=('{train}',) DATASETS.TEST=('{test}',)"


def caffe2(number: str) -> str:
    return f"catalog://Caffe2Detectron/COCO/{number}"


R50, R101, X = body("R-50-FPN"), body("R-101-FPN"), body("R-101-FPN", X101) + " x"
C4 = f"MODEL.WEIGHT={MSRA}R-50"
FILES = {
    "e2e_faster_rcnn_R_50_C4_1x": f"{C4} c4 coco 8",
    "e2e_mask_rcnn_R_50_C4_1x": f"{C4} c4 c4mask coco 8",
    "e2e_keypoint_rcnn_R_50_FPN_1x": f"{R50} {FASTER} keypoint people 16",
    "e2e_mask_rcnn_R_50_FPN_1x_periodically_testing": f"{R50} {MASK} coco 16 SOLVER.TEST_PERIOD=2500",
    "rpn_R_50_C4_1x": f"{C4} coco 16 MODEL.RPN_ONLY=True MODEL.RPN.PRE_NMS_TOP_N_TEST=12000 "
    "MODEL.RPN.POST_NMS_TOP_N_TEST=2000",
    "test_time_aug/e2e_mask_rcnn_R_50_FPN_1x": f"{R50} {MASK} coco 16 TEST.BBOX_AUG.ENABLED=True "
    "TEST.BBOX_AUG.H_FLIP=True TEST.BBOX_AUG.SCALES=(400,500,600,700,900,1000,1100,1200) TEST.BBOX_AUG.MAX_SIZE=2000 "
    "TEST.BBOX_AUG.SCALE_H_FLIP=True",
    "caffe2/e2e_faster_rcnn_R_50_C4_1x_caffe2": f"MODEL.WEIGHT={caffe2('35857197/e2e_faster_rcnn_R-50-C4_1x')} test",
    "caffe2/e2e_mask_rcnn_R_50_C4_1x_caffe2": f"MODEL.WEIGHT={caffe2('35858791/e2e_mask_rcnn_R-50-C4_1x')} c4mask test",
    "caffe2/e2e_keypoint_rcnn_R_50_FPN_1x_caffe2": body("R-50-FPN", caffe2("37697547/e2e_keypoint_rcnn_R-50-FPN_1x"))
    + f" {FASTER} keypoint people 16",
    "caffe2/e2e_mask_rcnn_X-152-32x8d-FPN-IN5k_1.44x_caffe2": body(
        "R-152-FPN", caffe2("37129812/e2e_mask_rcnn_X-152-32x8d-FPN-IN5k_1.44x")
    )
    + f" {MASK} x test",
    "quick_schedules/e2e_faster_rcnn_R_50_C4_quick": f"{C4} c4 256 quick two",
    "quick_schedules/e2e_mask_rcnn_R_50_C4_quick": f"{C4} c4 c4mask 256 quick",
    "quick_schedules/e2e_faster_rcnn_R_50_FPN_quick": f"{R50} {FASTER} 256 quick",
    "quick_schedules/e2e_mask_rcnn_R_50_FPN_quick": f"{R50} {MASK} 256 quick",
    "quick_schedules/e2e_faster_rcnn_X_101_32x8d_FPN_quick": f"{X} {FASTER} 256 quick two",
    "quick_schedules/e2e_mask_rcnn_X_101_32x8d_FPN_quick": f"{X} {MASK} 256 quick two",
    "quick_schedules/e2e_keypoint_rcnn_R_50_FPN_quick": f"{R50} {FASTER} 256 quick keypoint "
    + datasets("keypoints_coco_2014_minival", "keypoints_coco_2014_minival"),
    "quick_schedules/rpn_R_50_FPN_quick": f"{R50} fpn rpn quick",
    "pascal_voc/e2e_faster_rcnn_R_50_C4_1x_1_gpu_voc": f"{C4} voc SOLVER.BASE_LR=0.001 SOLVER.STEPS=(50000,) "
    "SOLVER.MAX_ITER=70000 SOLVER.IMS_PER_BATCH=1 TEST.IMS_PER_BATCH=1",
    "pascal_voc/e2e_faster_rcnn_R_50_C4_1x_4_gpu_voc": f"{C4} voc SOLVER.BASE_LR=0.004 SOLVER.STEPS=(12500,) "
    "SOLVER.MAX_ITER=17500 SOLVER.IMS_PER_BATCH=4 TEST.IMS_PER_BATCH=4",
    "pascal_voc/e2e_mask_rcnn_R_50_FPN_1x_cocostyle": f"{R50} {MASK} city MODEL.ROI_BOX_HEAD.NUM_CLASSES=21 "
    + datasets("voc_2012_train_cocostyle", "voc_2012_val_cocostyle"),
    "retinanet/retinanet_R-50-FPN_1x_quick": f"{body('R-50-FPN-RETINANET')} {FASTER} retina quick "
    "SOLVER.STEPS=(3500,) SOLVER.MAX_ITER=4000 TEST.IMS_PER_BATCH=8",
    "retinanet/retinanet_X_101_32x8d_FPN_1x": f"{body('R-101-FPN-RETINANET', X101)} x {FASTER} retina coco sizes "
    "SOLVER.BASE_LR=0.0025 SOLVER.WEIGHT_DECAY=0.0001 SOLVER.STEPS=(240000,320000) SOLVER.MAX_ITER=360000 "
    "SOLVER.IMS_PER_BATCH=4",
}
for name, net, schedule in (("R_50", R50, "16"), ("R_101", R101, "16"), ("X_101_32x8d", X, "8")):
    FILES[f"e2e_faster_rcnn_{name}_FPN_1x"] = f"{net} {FASTER} coco {schedule}"
    FILES[f"e2e_mask_rcnn_{name}_FPN_1x"] = f"{net} {MASK} coco {schedule}"
    FILES[f"rpn_{name}_FPN_1x"] = f"{net} fpn rpn coco 16"
for name, faster, mask in (
    ("R-50-FPN", "35857345", "35858933"),
    ("R-101-FPN", "35857890", "35861795"),
    ("X-101-32x8d-FPN", "36761737", "36761843"),
):
    for kind, number, blocks in (("faster", faster, FASTER), ("mask", mask, MASK)):
        weight, x = caffe2(f"{number}/e2e_{kind}_rcnn_{name}_1x"), " x" if name.startswith("X") else ""
        network = body("R-101-FPN" if "101" in name else "R-50-FPN", weight)
        FILES[f"caffe2/e2e_{kind}_rcnn_{name.replace('-', '_')}_1x_caffe2"] = f"{network} {blocks}{x} test"
for kind, blocks, gnmask in (("faster", FASTER, ""), ("mask", MASK, " gnmask")):
    for head, xconv in (("", ""), ("Xconv1fc_", " xconv")):
        gn = f"{body('R-50-FPN', MSRA + 'R-50-GN')} {blocks} gn{gnmask}{xconv} coco sizes batches"
        FILES[f"gn_baselines/e2e_{kind}_rcnn_R_50_FPN_{head}1x_gn"] = f"{gn} 16"
        FILES[f"gn_baselines/scratch_e2e_{kind}_rcnn_R_50_FPN_{head}3x_gn"] = f"{gn} frozen0 3x MODEL.WEIGHT="
    for version, dcn in (("dconv", "dcn"), ("mdconv", "dcn mdcn")):
        FILES[f"dcn/e2e_{kind}_rcnn_{version}_R_50_FPN_1x"] = f"{R50} {blocks} {dcn} coco sizes batches 16"
    FILES[f"cityscapes/e2e_{kind}_rcnn_R_50_FPN_1x_cocostyle"] = (
        f"{R50} {blocks} city MODEL.ROI_BOX_HEAD.NUM_CLASSES=9 "
        + datasets(f"{CITY}_train_cocostyle", f"{CITY}_val_cocostyle")
    )
for name, split in (("binarymask", "mask"), ("poly", "poly")):
    FILES[f"cityscapes/e2e_mask_rcnn_R_50_FPN_1x_{name}"] = (
        f"{R50} {MASK} city large OUTPUT_DIR=runs/cityscapes_{split} "
        + datasets(f"cityscapes_{split}_instance_train", f"cityscapes_{split}_instance_val")
    )
for depth in (50, 101):
    for name, p5 in (("", ""), ("P5_", " MODEL.RETINANET.USE_C5=False")):
        FILES[f"retinanet/retinanet_R-{depth}-FPN_{name}1x"] = (
            f"{body(f'R-{depth}-FPN-RETINANET')} {FASTER} retina coco sizes 8 SOLVER.BASE_LR=0.005{p5}"
        )

# Their names and MODEL.FBNET.ARCH; MODEL.BACKBONE.CONV_BODY is FBNet
FBNET = {
    "e2e_faster_rcnn_fbnet": "default",
    "e2e_faster_rcnn_fbnet_600": "default",
    "e2e_faster_rcnn_fbnet_chamv1a_600": "cham_v1a",
    "e2e_mask_rcnn_fbnet": "default",
    "e2e_mask_rcnn_fbnet_600": "default",
    "e2e_mask_rcnn_fbnet_xirb16d_dsmask": "xirb16d_dsmask",
    "e2e_mask_rcnn_fbnet_xirb16d_dsmask_600": "xirb16d_dsmask",
}

# Upstream's 2014 splits and the 2017 ones: the same images, the same annotations
SPLITS = {
    ("coco_2014_train", "coco_2014_valminusminival"): ("coco_2017_train",),
    ("coco_2014_minival",): ("coco_2017_val",),
    ("keypoints_coco_2014_train", "keypoints_coco_2014_valminusminival"): ("keypoints_coco_2017_train",),
    ("keypoints_coco_2014_minival",): ("keypoints_coco_2017_val",),
}


def values_of(name: str) -> dict[str, str]:
    """Flat keys and values of a file, later blocks over earlier ones."""
    values = {"MODEL.META_ARCHITECTURE": "GeneralizedRCNN"}
    for word in FILES[name].split():
        for pair in BLOCKS.get(word, word).split():
            key, _, value = pair.partition("=")
            values[key] = value
    return values


def text_of(name: str) -> str:
    """The file as upstream writes it: nested, tuples as text."""
    tree: dict = {}
    for key, value in values_of(name).items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value if value.startswith("(") or not value else yaml.safe_load(value)
    return yaml.safe_dump(tree)
