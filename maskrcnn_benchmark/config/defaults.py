"""Every configuration key, its default, and one comment. Names and defaults are upstream maskrcnn-benchmark's
where it has the key; keys of ours are marked (+)."""

from yacs.config import CfgNode as CN

_C = CN()

# float32, float16 (with a gradient scaler) or bfloat16: the autocast type of the forward pass
_C.DTYPE = "float32"
# Where a run writes everything; created when missing
_C.OUTPUT_DIR = "."
# (+) Seed of initialisation, data order, augmentation and sampling
_C.SEED = 0
# (+) Only deterministic algorithms; where the device has none for some operators, the run ends with their names
_C.DETERMINISTIC = False
# Evaluate after every epoch (the MLPerf forks' key)
_C.PER_EPOCH_EVAL = False
# Write model_*.pth (the MLPerf forks' key); False for runs that measure speed
_C.SAVE_CHECKPOINTS = True

# ------------------------------------------------------------------------------------------------ model
_C.MODEL = CN()
# Upstream's name of every detector; RETINANET_ON, MASK_ON and KEYPOINT_ON tell them apart
_C.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
# auto, cpu, cuda, cuda:1, npu, mps, xpu or a plug-in's name; only auto may land on the CPU
_C.MODEL.DEVICE = "auto"
# Weights to start from: a file of ours or of a peer (docs/weights.md), or catalog://ImageNetPretrained/MSRA/R-50;
# empty: from scratch
_C.MODEL.WEIGHT = ""
# (+) Read a .pkl or .pdparams weights file (Detectron's, detectron2's, PaddleDetection's): arrays alone, through an
# unpickler that knows nothing else
_C.MODEL.ALLOW_PICKLE = False
# Predict instance masks (Mask R-CNN) or boxes alone (Faster R-CNN)
_C.MODEL.MASK_ON = False
# One box regression for all classes instead of one a class
_C.MODEL.CLS_AGNOSTIC_BBOX_REG = False
# (+) Cascade R-CNN: box heads in a row, MODEL.ROI_BOX_CASCADE_HEAD
_C.MODEL.CASCADE_ON = False
# (+) Where MODEL.WEIGHT was made for other classes: class layers that do not fit keep their fresh weights, and the log
# names them. False: another number of classes is an error
_C.MODEL.REPLACE_HEADS = False
# A region proposal network alone, judged by the average recall of its boxes. Upstream's RetinaNet yamls set it too,
# where it says nothing more than RETINANET_ON
_C.MODEL.RPN_ONLY = False
# RetinaNet instead of a region-based detector
_C.MODEL.RETINANET_ON = False
# Predict keypoints (Keypoint R-CNN)
_C.MODEL.KEYPOINT_ON = False

# (+) The "+1" of Detectron and upstream: a box is named by its first and its last pixel and its width is x2 - x1 + 1.
# It decides how boxes are clipped, resized, mirrored and pooled, masks cropped: docs/conventions.md lists every place
_C.MODEL.LEGACY_PLUS_ONE = False

_C.MODEL.BACKBONE = CN()
# R-{18,34,50,101,152}[vd]-{C4,C5,FPN,FPN-RETINANET} or HRNet-W{18,30,32,40,48}-FPN; vd: PaddleX's ResNet_vd
_C.MODEL.BACKBONE.CONV_BODY = "R-50-C4"
# How many stages from the stem on are frozen: 0 none, 2 the stem and res2
_C.MODEL.BACKBONE.FREEZE_CONV_BODY_AT = 2

_C.MODEL.RESNETS = CN()
# More than 1: ResNeXt
_C.MODEL.RESNETS.NUM_GROUPS = 1
# Channels of a group in res2's 3x3 convolutions
_C.MODEL.RESNETS.WIDTH_PER_GROUP = 64
# Stride on the first 1x1 (MSRA's weights) or on the 3x3 (torchvision's)
_C.MODEL.RESNETS.STRIDE_IN_1X1 = True
# (+) FrozenBN, BN, SyncBN or GN; upstream says the same with TRANS_FUNC and STEM_FUNC
_C.MODEL.RESNETS.NORM = "FrozenBN"
# (+) Added to the variance of a frozen batch norm; upstream's published weights were trained with 0
_C.MODEL.RESNETS.FROZEN_BN_EPS = 1e-5
# Which of res2 .. res5 have deformable 3x3 convolutions (Dai et al. 2017)
_C.MODEL.RESNETS.STAGE_WITH_DCN = (False, False, False, False)
# Deformable convolutions weigh their taps too (version 2, Zhu et al. 2019)
_C.MODEL.RESNETS.WITH_MODULATED_DCN = False
# Equal parts of the channels that have offsets of their own
_C.MODEL.RESNETS.DEFORMABLE_GROUPS = 1
# Dilation of the 3x3 convolutions of res5
_C.MODEL.RESNETS.RES5_DILATION = 1
# Channels of every FPN level, or of C4
_C.MODEL.RESNETS.BACKBONE_OUT_CHANNELS = 1024
# Channels that leave res2; doubled by each later stage (R-18 and R-34: a quarter of it, 64 for 256)
_C.MODEL.RESNETS.RES2_OUT_CHANNELS = 256
_C.MODEL.RESNETS.STEM_OUT_CHANNELS = 64

_C.MODEL.FPN = CN()
# Group norm after each FPN convolution
_C.MODEL.FPN.USE_GN = False
# (+) Another norm there: FrozenBN, BN, SyncBN, GN or none
_C.MODEL.FPN.NORM = ""
# ReLU after each FPN convolution
_C.MODEL.FPN.USE_RELU = False

# (+) AugFPN's three parts (Guo et al. 2020), with -FPN bodies
_C.MODEL.AUG_FPN = CN()
# (+) Context of C5 at RATIOS of its sides, added to the top of the pyramid
_C.MODEL.AUG_FPN.RESIDUAL_AUGMENTATION = False
_C.MODEL.AUG_FPN.RATIOS = (0.1, 0.2, 0.3)
# (+) In training, a further box head learns on every lateral map; its losses count SUPERVISION_WEIGHT times
_C.MODEL.AUG_FPN.CONSISTENT_SUPERVISION = False
_C.MODEL.AUG_FPN.SUPERVISION_WEIGHT = 0.25
# (+) RoI features are a learned sum of those from all levels, in place of the one that suits the box's size
_C.MODEL.AUG_FPN.SOFT_ROI_SELECTION = False

_C.MODEL.RETINANET = CN()
# Classes and the background
_C.MODEL.RETINANET.NUM_CLASSES = 81
# (+) The head has a channel for the background too, never wanted in training (torchvision)
_C.MODEL.RETINANET.BACKGROUND_CHANNEL = False
# Anchor sides of each level, in pixels of the resized image, and the level's stride
_C.MODEL.RETINANET.ANCHOR_SIZES = (32, 64, 128, 256, 512)
_C.MODEL.RETINANET.ANCHOR_STRIDES = (8, 16, 32, 64, 128)
# Height : width. MODEL.RPN.ANCHOR_ROUNDING and ANCHOR_GRID hold here too
_C.MODEL.RETINANET.ASPECT_RATIOS = (0.5, 1.0, 2.0)
# Sizes of a level: SCALES_PER_OCTAVE from ANCHOR_SIZES on, evenly up to OCTAVE times it
_C.MODEL.RETINANET.OCTAVE = 2.0
_C.MODEL.RETINANET.SCALES_PER_OCTAVE = 3
# (+) These sizes are cut to whole pixels (torchvision)
_C.MODEL.RETINANET.WHOLE_ANCHOR_SIZES = False
# Anchors further outside the image than this take no part in the losses; -1 keeps all. Upstream's default is 0, but it
# keeps all whatever is set
_C.MODEL.RETINANET.STRADDLE_THRESH = -1
# P6 is made of C5 (the paper) or of P5
_C.MODEL.RETINANET.USE_C5 = True
# (+) A ReLU between P6 and P7's convolution (the paper) or none (MMDetection)
_C.MODEL.RETINANET.P7_RELU = True
# 3x3 convolutions of each tower, before the last
_C.MODEL.RETINANET.NUM_CONVS = 4
# (+) Norm after each of them: FrozenBN, BN, SyncBN, GN or none
_C.MODEL.RETINANET.NORM = ""
# (+) SmoothL1Loss, GIoULoss, DIoULoss or CIoULoss
_C.MODEL.RETINANET.BBOX_LOSS = "SmoothL1Loss"
# (+) Weights of dx, dy, dw, dh in the box coder; detectron2 and torchvision: 1
_C.MODEL.RETINANET.BOX_CODER_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
# The box loss is divided by this, besides its normalizer
_C.MODEL.RETINANET.BBOX_REG_WEIGHT = 4.0
# Smooth L1's bend in the box loss; 0 is L1
_C.MODEL.RETINANET.BBOX_REG_BETA = 0.11
_C.MODEL.RETINANET.FG_IOU_THRESHOLD = 0.5
_C.MODEL.RETINANET.BG_IOU_THRESHOLD = 0.4
# The focal loss
_C.MODEL.RETINANET.LOSS_ALPHA = 0.25
_C.MODEL.RETINANET.LOSS_GAMMA = 2.0
# (+) What divides the losses. batch: positives + images, the box loss positives. image: each image's positives
# (torchvision). positives: all images' (MMDetection). moving_average: of the positives over steps (detectron2)
_C.MODEL.RETINANET.LOSS_NORMALIZER = "batch"
# Probability of each class before training
_C.MODEL.RETINANET.PRIOR_PROB = 0.01
# Detections: pairs of anchor and class kept before NMS, a level; least score; IoU for NMS within a class
_C.MODEL.RETINANET.PRE_NMS_TOP_N = 1000
_C.MODEL.RETINANET.INFERENCE_TH = 0.05
_C.MODEL.RETINANET.NMS_TH = 0.4
# (+) Boxes are cut to the image before NMS, or after it (detectron2)
_C.MODEL.RETINANET.CLIP_BEFORE_NMS = True
# (+) Boxes of which that leaves nothing are no candidates (MMDetection)
_C.MODEL.RETINANET.DROP_EMPTY = False

_C.MODEL.GROUP_NORM = CN()
# Channels of a group, or -1 to use NUM_GROUPS
_C.MODEL.GROUP_NORM.DIM_PER_GP = -1
_C.MODEL.GROUP_NORM.NUM_GROUPS = 32
_C.MODEL.GROUP_NORM.EPSILON = 1e-5

_C.MODEL.RPN = CN()
_C.MODEL.RPN.USE_FPN = False
# Anchor sides in pixels of the resized image; with FPN one a level
_C.MODEL.RPN.ANCHOR_SIZES = (32, 64, 128, 256, 512)
# Stride of each level the RPN looks at
_C.MODEL.RPN.ANCHOR_STRIDE = (16,)
# Height : width
_C.MODEL.RPN.ASPECT_RATIOS = (0.5, 1.0, 2.0)
# (+) none: exact floats (detectron2). corners: rounded to whole pixels (torchvision). stride: sides rounded for an
# anchor of the stride's size, then multiplied (upstream)
_C.MODEL.RPN.ANCHOR_ROUNDING = "none"
# (+) Where in a cell of the grid its anchors have their centre, in strides: 0 the corner, 0.5 the middle (upstream)
_C.MODEL.RPN.ANCHOR_OFFSET = 0.0
# (+) grid: strides from ANCHOR_STRIDE. image: padded image side // map side (torchvision)
_C.MODEL.RPN.ANCHOR_GRID = "grid"
# Anchors further outside the image than this take no part in the loss; -1 keeps all
_C.MODEL.RPN.STRADDLE_THRESH = 0
_C.MODEL.RPN.FG_IOU_THRESHOLD = 0.7
_C.MODEL.RPN.BG_IOU_THRESHOLD = 0.3
# Anchors sampled for the loss, an image, and the most of them that may be positive
_C.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 256
_C.MODEL.RPN.POSITIVE_FRACTION = 0.5
# Proposals kept before NMS; with FPN a level
_C.MODEL.RPN.PRE_NMS_TOP_N_TRAIN = 12000
_C.MODEL.RPN.PRE_NMS_TOP_N_TEST = 6000
# Proposals kept after NMS; with FPN a level
_C.MODEL.RPN.POST_NMS_TOP_N_TRAIN = 2000
_C.MODEL.RPN.POST_NMS_TOP_N_TEST = 1000
_C.MODEL.RPN.NMS_THRESH = 0.7
# Proposals whose width or height is not above this are dropped
_C.MODEL.RPN.MIN_SIZE = 0.0
# (+) Proposals of a lower probability are dropped
_C.MODEL.RPN.SCORE_THRESH = 0.0
# With FPN: proposals kept over all levels
_C.MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN = 2000
_C.MODEL.RPN.FPN_POST_NMS_TOP_N_TEST = 2000
# In training, FPN_POST_NMS_TOP_N_TRAIN counts the whole batch (as Detectron did) or each image
_C.MODEL.RPN.FPN_POST_NMS_PER_BATCH = True
# (+) Smooth L1's bend in the box loss; 0 is L1
_C.MODEL.RPN.SMOOTH_L1_BETA = 1.0 / 9
# (+) sampled: losses over the anchors sampled. batch: over BATCH_SIZE_PER_IMAGE x images (detectron2)
_C.MODEL.RPN.LOSS_NORMALIZER = "sampled"
# (+) SigmoidCrossEntropy, or SigmoidFocalLoss over the number of positives, with the alpha and gamma below
_C.MODEL.RPN.CLS_LOSS = "SigmoidCrossEntropy"
_C.MODEL.RPN.FOCAL_LOSS_ALPHA = 0.25
_C.MODEL.RPN.FOCAL_LOSS_GAMMA = 2.0
# (+) The best anchors are chosen by their logit or, as upstream does, by their probability, in which float32 makes
# large logits equal
_C.MODEL.RPN.RANK_BY = "logit"
# (+) Channels of the RPN's 3x3 convolutions; 0 for as many as it reads
_C.MODEL.RPN.CONV_DIM = 0
# (+) How many of them there are
_C.MODEL.RPN.NUM_CONVS = 1

_C.MODEL.ROI_HEADS = CN()
_C.MODEL.ROI_HEADS.USE_FPN = False
_C.MODEL.ROI_HEADS.FG_IOU_THRESHOLD = 0.5
_C.MODEL.ROI_HEADS.BG_IOU_THRESHOLD = 0.5
# Weights of dx, dy, dw, dh in the box coder
_C.MODEL.ROI_HEADS.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
# Proposals sampled for the loss, an image, and the most of them that may be positive
_C.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 512
_C.MODEL.ROI_HEADS.POSITIVE_FRACTION = 0.25
# (+) BBoxAssigner: negatives at random. LibraBBoxAssigner: as many from each third of the overlaps (Libra R-CNN)
_C.MODEL.ROI_HEADS.BBOX_ASSIGNER = "BBoxAssigner"
# Detections: least score, IoU for NMS within a class, most an image
_C.MODEL.ROI_HEADS.SCORE_THRESH = 0.05
_C.MODEL.ROI_HEADS.NMS = 0.5
_C.MODEL.ROI_HEADS.DETECTIONS_PER_IMG = 100
# (+) MultiClassNMS, MultiClassCiouNMS, or MultiClassSoftNMS: scores fall with exp(-IoU^2 / SOFT_NMS_SIGMA), and
# ROI_HEADS.NMS is not used; PaddleX advises 300 detections from score .01 on
_C.MODEL.ROI_HEADS.NMS_TYPE = "MultiClassNMS"
_C.MODEL.ROI_HEADS.SOFT_NMS_SIGMA = 0.5

_C.MODEL.ROI_BOX_HEAD = CN()
# ResNet50Conv5ROIFeatureExtractor (C4), FPN2MLPFeatureExtractor or FPNXconv1fcFeatureExtractor
_C.MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR = "ResNet50Conv5ROIFeatureExtractor"
# FastRCNNPredictor (C4: average pool first) or FPNPredictor
_C.MODEL.ROI_BOX_HEAD.PREDICTOR = "FastRCNNPredictor"
_C.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 14
# Samples a bin and axis; 0: ceil(RoI side / bins)
_C.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO = 0
# 1 / stride of each level
_C.MODEL.ROI_BOX_HEAD.POOLER_SCALES = (1.0 / 16,)
# (+) RoIAlign shifted by half a pixel (detectron2) or not, with sides of at least 1 (Detectron, torchvision)
_C.MODEL.ROI_BOX_HEAD.POOLER_ALIGNED = True
# Classes and the background
_C.MODEL.ROI_BOX_HEAD.NUM_CLASSES = 81
_C.MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM = 1024
# FPNXconv1fcFeatureExtractor: channels and number of its 3x3 convolutions, and their dilation
_C.MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM = 256
_C.MODEL.ROI_BOX_HEAD.NUM_STACKED_CONVS = 4
_C.MODEL.ROI_BOX_HEAD.DILATION = 1
# Group norm after the head's convolutions, or after its fully connected layers where it has no convolutions
_C.MODEL.ROI_BOX_HEAD.USE_GN = False
# (+) as for FPN
_C.MODEL.ROI_BOX_HEAD.NORM = ""
# (+) Smooth L1's bend in the box loss; 0 is L1
_C.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA = 1.0
# (+) SmoothL1Loss, GIoULoss, DIoULoss or CIoULoss, and its weight: PaddleX and MMDetection weigh the latter three by 10
_C.MODEL.ROI_BOX_HEAD.BBOX_LOSS = "SmoothL1Loss"
_C.MODEL.ROI_BOX_HEAD.BBOX_LOSS_WEIGHT = 1.0

_C.MODEL.ROI_BOX_CASCADE_HEAD = CN()
# (+) With CASCADE_ON, in place of ROI_HEADS' thresholds: the IoU that makes a positive, a stage each
_C.MODEL.ROI_BOX_CASCADE_HEAD.IOUS = (0.5, 0.6, 0.7)
# (+) The box coder's weights a stage, the inverse of MMDetection's target_stds
_C.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS = (
    (10.0, 10.0, 5.0, 5.0),
    (20.0, 20.0, 10.0, 10.0),
    (30.0, 30.0, 15.0, 15.0),
)
# (+) What each stage's losses count (detectron2: 1, 1, 1)
_C.MODEL.ROI_BOX_CASCADE_HEAD.LOSS_WEIGHTS = (1.0, 0.5, 0.25)
# (+) Share of the stages' gradient that the pyramid gets (detectron2: 1 / stages)
_C.MODEL.ROI_BOX_CASCADE_HEAD.FEATURE_GRADIENT = 1.0
# (+) Scores: mean of the stages' probabilities (the paper, detectron2), or softmax of their mean logits (MMDetection)
_C.MODEL.ROI_BOX_CASCADE_HEAD.SCORE_AVERAGE = "probabilities"

_C.MODEL.ROI_MASK_HEAD = CN()
# ResNet50Conv5ROIFeatureExtractor (C4) or MaskRCNNFPNFeatureExtractor
_C.MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR = "ResNet50Conv5ROIFeatureExtractor"
_C.MODEL.ROI_MASK_HEAD.PREDICTOR = "MaskRCNNC4Predictor"
_C.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
_C.MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO = 0
_C.MODEL.ROI_MASK_HEAD.POOLER_SCALES = (1.0 / 16,)
# (+) as for the box head
_C.MODEL.ROI_MASK_HEAD.POOLER_ALIGNED = True
# Channels of the 3x3 convolutions; the last also of the transposed convolution
_C.MODEL.ROI_MASK_HEAD.CONV_LAYERS = (256, 256, 256, 256)
# Dilation of these convolutions
_C.MODEL.ROI_MASK_HEAD.DILATION = 1
# Side of the predicted mask: twice the extractor's output
_C.MODEL.ROI_MASK_HEAD.RESOLUTION = 14
# C4: the mask head reads the box head's features
_C.MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR = True
_C.MODEL.ROI_MASK_HEAD.USE_GN = False
# (+) as for FPN
_C.MODEL.ROI_MASK_HEAD.NORM = ""
# (+) With CASCADE_ON: a mask head a stage, whose masks are averaged (MMDetection), or one, of the first stage's RoIs
_C.MODEL.ROI_MASK_HEAD.PER_STAGE = False
# Upstream's switch to paste masks in the model; results are always in image pixels here, so only the default is taken
_C.MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS = False
# A pixel belongs to the object from this probability on
_C.MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS_THRESHOLD = 0.5
# (+) Targets from bitmaps: unaligned RoIAlign's soft values (torchvision) or aligned and cut at .5 (detectron2)
_C.MODEL.ROI_MASK_HEAD.SOFT_BITMAP_TARGETS = False
# (+) Masks are pasted into boxes with corners cut to whole pixels (upstream, torchvision) or as they are (detectron2)
_C.MODEL.ROI_MASK_HEAD.PASTE_WHOLE_PIXELS = False

_C.MODEL.ROI_KEYPOINT_HEAD = CN()
_C.MODEL.ROI_KEYPOINT_HEAD.FEATURE_EXTRACTOR = "KeypointRCNNFeatureExtractor"
_C.MODEL.ROI_KEYPOINT_HEAD.PREDICTOR = "KeypointRCNNPredictor"
_C.MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION = 14
_C.MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO = 0
_C.MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES = (1.0 / 16,)
# (+) as for the box head
_C.MODEL.ROI_KEYPOINT_HEAD.POOLER_ALIGNED = True
# Channels of the 3x3 convolutions
_C.MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS = (512,) * 8
# Side of the predicted heat map: four times POOLER_RESOLUTION
_C.MODEL.ROI_KEYPOINT_HEAD.RESOLUTION = 14
# Keypoints of an object
_C.MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES = 17
# Upstream's default; the head has features of its own, so KEYPOINT_ON needs False
_C.MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR = True
# (+) Which positives the loss looks at. object: those whose object has a visible point in its own box. proposal: those
# with one of its visible points in the proposal (detectron2). all (torchvision)
_C.MODEL.ROI_KEYPOINT_HEAD.POSITIVES = "object"

# ------------------------------------------------------------------------------------------------- data
_C.INPUT = CN()
# Short side of training images; several: one drawn for each image
_C.INPUT.MIN_SIZE_TRAIN = (800,)
# (+) choice: one of MIN_SIZE_TRAIN. range: any whole number from the first to the second
_C.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
# Longest side allowed
_C.INPUT.MAX_SIZE_TRAIN = 1333
_C.INPUT.MIN_SIZE_TEST = 800
_C.INPUT.MAX_SIZE_TEST = 1333
# (+) nearest: both sides of a resized image are rounded (detectron2). down: the short side is exact, the long one cut
# to a whole number (upstream)
_C.INPUT.RESIZE_ROUNDING = "nearest"
# (+) opencv: area average when shrinking, bilinear when enlarging. pillow: its antialiased bilinear filter (upstream,
# detectron2), slower
_C.INPUT.RESIZE_BY = "opencv"
# Mean and standard deviation, in the channel order and range that TO_BGR255 says. As many as the model reads channels:
# 3, or others through the Python interface (docs/models.md)
_C.INPUT.PIXEL_MEAN = [102.9801, 115.9465, 122.7717]
_C.INPUT.PIXEL_STD = [1.0, 1.0, 1.0]
# The network reads BGR 0..255 (Caffe2's weights) or RGB 0..1 (torchvision's)
_C.INPUT.TO_BGR255 = True
_C.INPUT.HORIZONTAL_FLIP_PROB_TRAIN = 0.5
# (+) Pad every batch to the smallest of these (height, width) that holds it, e.g. ((800, 1344), (1344, 800))
_C.INPUT.FIXED_SHAPES = ()

# (+) What is done to training images instead of the resize and flip above: a list of transforms, see docs/data.md, e.g.
# [{type: RandomDistort}, {type: ResizeByShort, short_size: [640, 800]}, {type: RandomHorizontalFlip}]
_C.INPUT.TRANSFORMS = []

_C.DATASETS = CN()
# Names in the catalogue (data/catalog.py), FORMAT://PATH or module:Class (docs/data.md)
_C.DATASETS.TRAIN = ()
_C.DATASETS.TEST = ()

_C.DATA = CN()
# (+) Directory in which the catalogue's data sets lie
_C.DATA.PATH = ""

_C.DATALOADER = CN()
# Processes that read and transform images, a rank; 0: in the training process
_C.DATALOADER.NUM_WORKERS = 4
# Batches are padded to a multiple of this; FPN needs 32
_C.DATALOADER.SIZE_DIVISIBILITY = 0
# Portrait and landscape images in batches of their own: less padding
_C.DATALOADER.ASPECT_RATIO_GROUPING = True
# (+) Share of the training images without objects that is kept, 0..1
_C.DATALOADER.EMPTY_IMAGE_RATIO = 1.0

# ----------------------------------------------------------------------------------------------- solver
_C.SOLVER = CN()
_C.SOLVER.MAX_ITER = 40000
# (+) When above 0 it replaces MAX_ITER, and STEPS count epochs
_C.SOLVER.MAX_EPOCHS = 0
# Images a step over all ranks
_C.SOLVER.IMS_PER_BATCH = 16
# (+) Backward passes a step: each takes IMS_PER_BATCH / ACCUMULATE_STEPS images
_C.SOLVER.ACCUMULATE_STEPS = 1
# (+) SGD, AdamW, or ApexFusedSGD (NVIDIA apex installed)
_C.SOLVER.OPTIMIZER = "SGD"
_C.SOLVER.BASE_LR = 0.001
# (+) When above 0: BASE_LR, MAX_ITER, STEPS and WARMUP_ITERS were chosen for this many images a step, and are scaled
# to IMS_PER_BATCH (linear rule, Goyal et al. 2017)
_C.SOLVER.REFERENCE_IMS_PER_BATCH = 0
# Learning rate of biases over BASE_LR
_C.SOLVER.BIAS_LR_FACTOR = 2.0
_C.SOLVER.MOMENTUM = 0.9
_C.SOLVER.WEIGHT_DECAY = 0.0005
_C.SOLVER.WEIGHT_DECAY_BIAS = 0.0
# (+) multistep or cosine
_C.SOLVER.LR_SCHEDULER = "multistep"
# multistep: the rate is multiplied by GAMMA at each of STEPS
_C.SOLVER.GAMMA = 0.1
_C.SOLVER.STEPS = (30000,)
_C.SOLVER.WARMUP_FACTOR = 1.0 / 3
_C.SOLVER.WARMUP_ITERS = 500
# linear, constant, or mlperf_linear (WARMUP_FACTOR is then the step of the rate an iteration)
_C.SOLVER.WARMUP_METHOD = "linear"
# (+) Gradients are scaled down to this norm; 0: never
_C.SOLVER.CLIP_GRADIENTS_NORM = 0.0
# (+) So many steps with a NaN or infinite gradient are left out, on all ranks alike, before one ends the run. float16's
# scaler leaves out steps of its own, which do not count
_C.SOLVER.SKIP_NONFINITE_STEPS = 0
# (+) Record a training step as a graph of the device and replay it, a graph for each shape of a batch
# (INPUT.FIXED_SHAPES keeps them few). Devices without graphs run eagerly and say so. Several ranks exchange gradients
# between two graphs, and have no SyncBN; docs/performance.md
_C.SOLVER.GRAPH_CAPTURE = False
# Iterations from one checkpoint to the next
_C.SOLVER.CHECKPOINT_PERIOD = 2500
# (+) Numbered checkpoints of this run kept on disk besides final and best; 0 keeps all
_C.SOLVER.CHECKPOINTS_KEPT = 0
# (+) Iterations from one evaluation to the next; 0: only at the end
_C.SOLVER.EVAL_PERIOD = 0
# (+) When above 0: a checkpoint and an evaluation after every so many epochs, in place of both periods above
_C.SOLVER.SAVE_EPOCHS = 0
# (+) Training stops when so many evaluations in a row are no better than the best before them; 0: never
_C.SOLVER.EARLY_STOP_PATIENCE = 0

_C.DISTRIBUTED = CN()
# (+) Seconds without progress after which a run of several ranks ends with the name of the rank that the others wait
# for; they also wait while the main rank scores a large test set
_C.DISTRIBUTED.TIMEOUT = 3600
# (+) MB (2^20 bytes) of gradients that ranks average at a time, while the backward pass goes on. Torch's own choice: 1,
# 5 and 100 were as fast on two ranks (docs/scaling.md). With SOLVER.GRAPH_CAPTURE all are averaged at once
_C.DISTRIBUTED.BUCKET_MB = 25

_C.MLPERF = CN()
# Training stops at the first evaluation that reaches both; 0, 0: never
_C.MLPERF.MIN_BBOX_MAP = 0.0
_C.MLPERF.MIN_SEGM_MAP = 0.0
# (+) With LOGGING.MLLOG, what the run says of itself: who submits it, by which rules (closed or open), where it runs
# (cloud, onprem, preview or research)
_C.MLPERF.ORG = "maskrcnn_benchmark"
_C.MLPERF.DIVISION = "open"
_C.MLPERF.STATUS = "onprem"

# ------------------------------------------------------------------------------------------ test, logging
_C.TEST = CN()
# Images a step over all ranks
_C.TEST.IMS_PER_BATCH = 8
# RetinaNet: most detections an image; the other detectors take MODEL.ROI_HEADS.DETECTIONS_PER_IMG
_C.TEST.DETECTIONS_PER_IMG = 100
# (+) OKS sigma of each keypoint; COCO's own where there are 17 and none are given
_C.TEST.KEYPOINT_SIGMAS = ()
# (+) hotcoco (Rust, many times faster) or pycocotools (the reference)
_C.TEST.EVALUATOR = "hotcoco"
# (+) What is computed: coco, and also voc07 (11 points), voc (area under the curve), cityscapes (masks)
_C.TEST.METRICS = ("coco",)
# (+) Score while training goes on. auto: with an accelerator and cores that neither ranks nor data workers use; always;
# never. A run that may stop at MLPERF's targets or at a plateau waits for every score
_C.TEST.OVERLAP = "auto"
# e.g. [["bbox", "AP", [0.377, 0.003]], ...]: the run fails when a result is not within SIGMA_TOL x sigma of the mean
_C.TEST.EXPECTED_RESULTS = []
_C.TEST.EXPECTED_RESULTS_SIGMA_TOL = 4.0

# Test-time augmentation: boxes of all views through one NMS; masks, and keypoints' heat maps, are their mean
_C.TEST.BBOX_AUG = CN()
_C.TEST.BBOX_AUG.ENABLED = False
# A mirrored view at INPUT.MIN_SIZE_TEST
_C.TEST.BBOX_AUG.H_FLIP = False
# Views at further short sides, whose long side is limited
_C.TEST.BBOX_AUG.SCALES = ()
_C.TEST.BBOX_AUG.MAX_SIZE = 4000
# Mirrored views at the further short sides too
_C.TEST.BBOX_AUG.SCALE_H_FLIP = False
# (+) The keypoint that each of 0, 1, ... becomes in a mirrored view; these are COCO's 17 of a person
_C.TEST.BBOX_AUG.KEYPOINT_MIRROR = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)

_C.LOGGING = CN()
# (+) Iterations from one log line to the next; the only place where a step waits for the device
_C.LOGGING.PERIOD = 20
# (+) The log names a rank for which the others wait more than this share of their steps
_C.LOGGING.STRAGGLER_SHARE = 0.3
# (+) Steps left out of every speed figure
_C.LOGGING.WARMUP_STEPS = 5
# (+) Write events.out.tfevents.*
_C.LOGGING.TENSORBOARD = True
# (+) Every rank writes train_{rank}.log; the launchers turn it on
_C.LOGGING.RANK_LOGS = False
# (+) Name of the network in CaseName.log, which is written when this is set; the launchers set it
_C.LOGGING.NETWORK = ""
# (+) Write MLPerf's log lines, :::MLLOG {...}, to OUTPUT_DIR/mllog.txt and the log
_C.LOGGING.MLLOG = False
# (+) Pictures with detections drawn that an evaluation writes to predictions/
_C.LOGGING.PREDICTION_IMAGES = 8


def get_defaults() -> CN:
    """A fresh, unfrozen copy of every key."""
    return _C.clone()
