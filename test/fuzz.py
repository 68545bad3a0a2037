"""Readers of files that others wrote, on inputs nobody would write: a named error or a result, in bounded memory.

    python test/fuzz.py coco --inputs 100000         # one reader, or several, or all; --seed N for other inputs

An input is a sound file with a few damages: values replaced, deleted or doubled in its tree, then bytes of its text.
The process may take MEMORY bytes more than it has at the start and each input SECONDS; an input that takes more, or
that raises what is no UserError, is shown with the seed that makes it again.
"""

from __future__ import annotations

import argparse
import base64
import copy
import faulthandler
import io
import itertools
import json
import logging
import pickle
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this file, installed or not

from maskrcnn_benchmark.config import dump, get_config
from maskrcnn_benchmark.data import cityscapes, labelme, masks, via, voc
from maskrcnn_benchmark.data.coco import CocoDataset
from maskrcnn_benchmark.data.content import Source
from maskrcnn_benchmark.data.download import unpack
from maskrcnn_benchmark.data.images import image_size, read_image
from maskrcnn_benchmark.engine import checkpoint
from maskrcnn_benchmark.errors import CheckpointError, ConfigError, DataError, UserError
from maskrcnn_benchmark.models.weights import load_weights
from maskrcnn_benchmark.ops.rle import compress_rle

MEMORY, SECONDS = 2 << 30, 30
# Inputs of one seed: hypothesis remembers what it has drawn, so that a longer run would become slow. So many are drawn
# at once: for one alone, it works half as long as a reader.
BATCH, TOGETHER = 100_000, 50
HEIGHT, WIDTH = 24, 32

HUGE = int("9" * 4300)  # json.dumps and str write no longer one
# What may stand in place of any value
ODD: list[Any] = [
    None,
    True,
    "",
    "x",
    "\0",
    "\ud800",
    "\x1b[31m",
    "<script>",
    "a" * 3000,
    [],
    {},
    [[]],
    [None],
    {"a": 1},
]
ODD += [0, -1, 1, 2, 7, 2**31, 10**6, 2**63, -(2**63), 10**30, HUGE]
ODD += [0.5, -0.0, 1e-300, 1e9, 1e15, 1e39, 1e300, float("nan"), float("inf"), [1e300] * 6, [1e9, 0] * 4]
ODD += [[0, 0, 0, 0], [1, 2], ["a"] * 4, [[1, 2], [3, 4], [5, 6]], "../../x", "/etc/passwd", "2001-99-99", "(" * 300]
ODD += [{"size": [10**6, 10**6], "counts": [10**12]}, {"size": [HEIGHT, WIDTH], "counts": [10**12]}]
ODD += [{"size": [HEIGHT, WIDTH], "counts": "oooooooooooo"}, {"size": [2**40, 2**40], "counts": "0"}]


def damaged_tree(tree: Any, rng: Random) -> Any:
    """A copy with up to four values replaced by odd ones or by others of the tree, doubled, or deleted."""
    root = {"": pickle.loads(pickle.dumps(tree))}
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        spots = list(spots_of(root))
        container, key = rng.choice(spots)
        action = rng.random()
        if action < 0.7:
            container[key] = copy.deepcopy(rng.choice(ODD))
        elif action < 0.8:
            container[key] = [copy.deepcopy(container[key]), container[key]]
        elif action < 0.9:
            other, name = rng.choice(spots)
            container[key] = copy.deepcopy(other[name])
        elif container is not root:
            del container[key]
    return root[""]


def spots_of(container: Any):
    """Every (container, key or place) below."""
    for key in container if isinstance(container, dict) else range(len(container)):
        yield container, key
        if isinstance(container[key], (dict, list)):
            yield from spots_of(container[key])


def damaged_bytes(data: bytes, rng: Random, share: float = 0.25) -> bytes:
    """In this share of all cases: up to three bytes changed, or pieces inserted, deleted, doubled, the end cut off."""
    if rng.random() >= share:
        return data
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 4, 200))
        action = rng.randrange(5)
        if action == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif action == 1:
            data[at:at] = rng.randbytes(length)
        elif action == 2:
            del data[at : at + length]
        elif action == 3:
            data[at:at] = data[at : at + length]
        elif action == 4:
            del data[at:]
    return bytes(data)


# ---- what is damaged


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A sound head of a PNG of any size, and a few rows of zeros."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(4096))) + chunk(b"IEND", b"")
    )


PICTURE = np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3)
MAP = np.zeros((HEIGHT, WIDTH), np.uint8)
MAP[3:9, 4:12], MAP[10:20, 14:30] = 1, 2
PICTURE_FILE, MAP_FILE = png(PICTURE), png(MAP)
RLE = compress_rle(torch.tensor([100, 50, HEIGHT * WIDTH - 150]), torch.tensor([0, 3]))[0]
SQUARE = [4.0, 3, 12, 3, 12, 9, 4, 9]
COCO = {
    "info": {"year": 2026},
    "images": [
        {"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH},
        {"id": 2, "file_name": "a.png", "height": HEIGHT, "width": WIDTH},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 3, 8, 6], "area": 48, "segmentation": [SQUARE]}
        | {"iscrowd": 0, "keypoints": [5, 5, 2, 7, 5, 1], "num_keypoints": 2, "occ": 1},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [4, 3, 8, 6], "iscrowd": 0}
        | {"segmentation": {"size": [HEIGHT, WIDTH], "counts": RLE}},
        {"id": 3, "image_id": 2, "category_id": 1, "iscrowd": 1}
        | {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [100, 50, HEIGHT * WIDTH - 150]}},
        {"id": 4, "image_id": 2, "category_id": 1, "segmentation": [SQUARE, [1, 1, 9, 1, 9, 9]]},
    ],
    "categories": [
        {"id": 1, "name": "cat", "keypoints": ["left_eye", "right_eye"], "skeleton": [[1, 2]]},
        {"id": 2, "name": "dog"},
    ],
}
_SHAPES = [
    {"name": "polygon", "all_points_x": [4, 12, 12], "all_points_y": [3, 3, 9]},
    {"name": "rect", "x": 4, "y": 3, "width": 8, "height": 6},
    {"name": "circle", "cx": 9, "cy": 9, "r": 4},
    {"name": "ellipse", "cx": 9, "cy": 9, "rx": 4, "ry": 5, "theta": 0.3},
    {"name": "point", "cx": 9, "cy": 9},
]
_REGIONS = [{"shape_attributes": shape, "region_attributes": {"kind": "cat"}} for shape in _SHAPES]
_ENTRY = {"filename": "a.png", "size": 1, "regions": _REGIONS, "file_attributes": {}}
VIA = [
    {"a.png1": _ENTRY | {"regions": {str(i): region for i, region in enumerate(_REGIONS)}}},
    {
        "_via_settings": {},
        "_via_img_metadata": {"a.png1": _ENTRY},
        "_via_attributes": {"region": {"kind": {"type": "radio", "options": {"cat": "", "dog": ""}}}},
    },
]
_LABELS = [
    {"label": "cat", "points": [[4, 3], [12, 3], [12, 9]], "shape_type": "polygon", "group_id": 1, "flags": {}},
    {"label": "cat", "points": [[4, 3], [12, 9]], "shape_type": "rectangle", "group_id": None},
    {"label": "dog", "points": [[9, 9], [12, 9]], "shape_type": "circle"},
    {"label": "dog", "points": [[4, 3], [9, 7]], "shape_type": "mask"},
]
LABELME = {"version": "5", "shapes": _LABELS, "imagePath": "a.png", "imageHeight": HEIGHT, "imageWidth": WIDTH}
POLYGONS = [[4, 3], [12, 3], [12, 9]]
CITYSCAPES = {
    "imgHeight": HEIGHT,
    "imgWidth": WIDTH,
    "objects": [
        {"label": "car", "polygon": POLYGONS},
        {"label": "cargroup", "polygon": [[20, 3], [28, 3], [28, 9]]},
        {"label": "sky", "polygon": [[0, 0], [9, 0], [5, 5]], "deleted": 0},
    ],
}
VOC = {
    "filename": "a.png",
    "size": {"width": str(WIDTH), "height": str(HEIGHT), "depth": "3"},
    "object": {
        "name": "cat",
        "difficult": "0",
        "bndbox": {"xmin": "5", "ymin": "4", "xmax": "12", "ymax": "9"},
    },
}
CONFIG = {
    "_BASE_": [],
    "MODEL": {"META_ARCHITECTURE": "GeneralizedRCNN", "RPN": {"ANCHOR_STRIDE": [16]}, "MASK_ON": True},
    "DATASETS": {"TRAIN": ["coco_2017_train"], "TEST": "('coco_2017_val',)"},
    "SOLVER": {"BASE_LR": 1e-3, "STEPS": "(60, 80)", "MAX_ITER": 100, "IMS_PER_BATCH": 2, "GAMMA": "1e-1"},
    "INPUT": {"MIN_SIZE_TRAIN": [640, 800], "TRANSFORMS": [{"type": "RandomHorizontalFlip", "prob": 0.5}]},
    "TEST": {"EXPECTED_RESULTS": [["bbox", "AP", 0.3, 0.01]], "METRICS": ["coco"]},
}


def xml_of(tree: Any, name: str = "annotation") -> str:
    """The tree as XML, whatever it holds; what XML cannot say becomes damaged XML."""
    if isinstance(tree, dict):
        return f"<{name}>{''.join(xml_of(value, key) for key, value in tree.items())}</{name}>"
    if isinstance(tree, list):
        return "".join(xml_of(value, name) for value in tree)
    return f"<{name}>{tree}</{name}>"


class Tiny(nn.Module):
    """A backbone's first tensors under maskrcnn-benchmark's names, beside an RPN's."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"body": nn.ModuleDict({"stem": nn.ModuleDict({"conv1": nn.Conv2d(3, 2, 1)})})})
        self.rpn = nn.ModuleDict({"head": nn.ModuleDict({"conv": nn.Conv2d(2, 2, 1)})})


TINY = Tiny()


# ---- the readers


def use(dataset: CocoDataset) -> None:
    """What training, evaluation and the tools ask of a data set."""
    for index in range(len(dataset)):
        dataset.annotations(index)
        dataset.load(index).drawn()


def use_source(source: Source) -> None:
    if source.content is not None:
        use(CocoDataset(source.file, source.image_dir, True, content=source.content))


def text_of(tree: Any, rng: Random) -> bytes:
    """Damaged JSON of a damaged tree."""
    return damaged_bytes(json.dumps(damaged_tree(tree, rng)).encode(), rng)


def coco(rng: Random, root: Path) -> None:
    (root / "a.json").write_bytes(text_of(COCO, rng))
    use(CocoDataset(root / "a.json", root, True, masks=rng.random() < 0.8, keypoints=rng.random() < 0.5))


def read_via(rng: Random, root: Path) -> None:
    (root / "a.json").write_bytes(text_of(rng.choice(VIA), rng))
    use_source(via.read(root / "a.json", category=rng.choice(("", "object"))))


def read_labelme(rng: Random, root: Path) -> None:
    part = png_of_size(60_000, 60_000) if rng.random() < 0.05 else png(MAP[3:8, 4:10] * 255)
    mask = base64.b64encode(damaged_bytes(part, rng)).decode()
    tree = LABELME | {
        "shapes": [shape | ({"mask": mask} if shape["shape_type"] == "mask" else {}) for shape in _LABELS]
    }
    (root / "a.json").write_bytes(text_of(tree, rng))
    use_source(labelme.read(root))


def read_voc(rng: Random, root: Path) -> None:
    for name in ("Annotations", "SegmentationObject", "ImageSets/Main", "JPEGImages"):
        (root / name).mkdir(parents=True, exist_ok=True)
    text = xml_of(damaged_tree(VOC, rng)).encode("utf-8", "surrogatepass")
    (root / "Annotations" / "a.xml").write_bytes(damaged_bytes(text, rng))
    (root / "JPEGImages" / "a.png").write_bytes(PICTURE_FILE)
    (root / "SegmentationObject" / "a.png").unlink(missing_ok=True)
    if rng.random() < 0.5:
        (root / "SegmentationObject" / "a.png").write_bytes(MAP_FILE)
    (root / "ImageSets" / "Main" / "train.txt").write_bytes(damaged_bytes(b"a 1\n", rng, 0.1))
    use_source(voc.read(root, split=rng.choice(("", "train"))))


def read_cityscapes(rng: Random, root: Path) -> None:
    image, truth = root / "leftImg8bit" / "train" / "c", root / "gtFine" / "train" / "c"
    for directory in (image, truth):
        directory.mkdir(parents=True, exist_ok=True)
    (image / "a_leftImg8bit.png").write_bytes(PICTURE_FILE)
    (truth / "a_gtFine_polygons.json").write_bytes(text_of(CITYSCAPES, rng))
    use_source(cityscapes.read(root))


def map_bytes(rng: Random) -> bytes:
    """An instance map of any mode, or a head that promises more than there is."""
    if rng.random() < 0.1:
        return png_of_size(*rng.choice([(10**6, 10**6), (60_000, 60_000), (2**31 - 1, 1), (30_000, 30_000)]))
    stream = io.BytesIO()
    Image.fromarray(MAP).convert(rng.choice(("L", "P", "RGB", "RGBA", "1", "I;16", "LA"))).save(stream, "PNG")
    return stream.getvalue()


def read_masks(rng: Random, root: Path) -> None:
    for name in ("images", "masks"):
        (root / name).mkdir(exist_ok=True)
    (root / "images" / "a.png").write_bytes(PICTURE_FILE)
    (root / "masks" / "a.png").write_bytes(damaged_bytes(map_bytes(rng), rng, 0.7))
    use_source(masks.read(root, ignore=rng.choice(("", "", "2", "x", "-1", "9" * 30))))


def image(rng: Random, root: Path) -> None:
    data = map_bytes(rng)
    if rng.random() < 0.7:
        exif, stream = Image.Exif(), io.BytesIO()
        exif[0x0112] = rng.randrange(10)
        kind = rng.choice(("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000"))
        Image.fromarray(PICTURE).save(stream, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
        data = stream.getvalue()
    (root / "b.jpg").write_bytes(damaged_bytes(data, rng, 0.8))
    try:
        image_size(root / "b.jpg")
    finally:
        read_image(root / "b.jpg", rng.choice(((HEIGHT, WIDTH), None)), 7)


def config(rng: Random, root: Path) -> None:
    tree = damaged_tree(WHOLE if rng.random() < 0.05 else CONFIG, rng)
    text = json.dumps(tree) if rng.random() < 0.5 else yaml.dump(tree, Dumper=yaml.SafeDumper)  # JSON is yaml, too
    (root / "a.yaml").write_bytes(damaged_bytes(text.encode(), rng))
    get_config(root / "a.yaml")


def overrides(rng: Random, root: Path) -> None:
    pairs = [(rng.choice(KEYS), rng.choice(VALUES)) for _ in range(rng.randint(1, 3))]
    get_config(None, [word for pair in pairs for word in pair])


def _keys(tree: dict, prefix: str = "") -> list[str]:
    return [
        name
        for key, value in tree.items()
        for name in (_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key])
    ]


WHOLE = yaml.safe_load(dump(get_config()))
KNOWN = [*_keys(WHOLE), "_BASE_", "MODEL.RESNETS.TRANS_FUNC"]
KEYS = [*KNOWN, "MODEL", "MODEL.FBNET.X", "X", "", "a.b.c"]
VALUES = [str(value) for value in ODD if value != HUGE]
VALUES += ["9" * 5000, "-" * 9000 + "1", "[" * 500, "{[]: 1}", "1e400", "(1, 2", "__import__('os').system('false')"]
VALUES += ["~nobody-of-this-name/x.yaml", "True", "(4, 8)", "('a',)", "1", "-1", "0.5", "nan", "inf"]


def state_bytes(rng: Random, around: dict) -> bytes:
    """A file of torch.save; its tree is damaged, not its tensors."""
    stream = io.BytesIO()
    torch.save(damaged_tree({"model": dict(TINY.state_dict())} | around, rng), stream)
    return stream.getvalue()


def read_checkpoint(rng: Random, root: Path) -> None:
    around = {"optimizer": {"state": {}}, "scaler": None, "iteration": 3, "best": None, "config": "SEED: 1\n"}
    around |= {"category_ids": [1], "category_names": ["a"], "world_size": 1}
    (root / "model.pth").write_bytes(damaged_bytes(state_bytes(rng, around), rng, 0.5))
    checkpoint.load_model(TINY, checkpoint.read(root / "model.pth"), root / "model.pth")


def weights(rng: Random, root: Path) -> None:
    if rng.random() < 0.5:
        path, data = root / "model.pth", state_bytes(rng, {})
    else:
        state = {name: tensor.numpy() for name, tensor in TINY.state_dict().items()}
        path, data = root / "model.pkl", pickle.dumps(damaged_tree({"model": state}, rng), protocol=2)
    path.write_bytes(damaged_bytes(data, rng, 0.6))
    load_weights(TINY, str(path), allow_pickle=True)


MEMBERS = ["a.txt", "a.txt", "d/b.txt", "e/", "../c", "/d", "d", "a\\b", "\x1b[31m", "x" * 300, "é/ü"]


def archive(rng: Random, root: Path) -> None:
    stream, kind = io.BytesIO(), rng.choice(("zip", "w", "w:gz"))
    members = [(rng.choice(MEMBERS), bytes(rng.randrange(2000))) for _ in range(rng.randint(0, 3))]
    if kind == "zip":
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in members:
                file.writestr(name, content)
    else:
        with tarfile.open(fileobj=stream, mode=kind) as file:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.type, info.size, info.linkname = (
                    rng.choice((b"0", b"0", b"1", b"2", b"3")),
                    len(content),
                    "../../x",
                )
                file.addfile(info, io.BytesIO(content))
    (root / "a.archive").write_bytes(damaged_bytes(stream.getvalue(), rng, 0.6))
    with tempfile.TemporaryDirectory(dir=root) as directory:
        inside = Path(directory) / "deep" / "out"
        try:
            unpack(root / "a.archive", inside)
        finally:
            around = {path.name for path in (root, Path(directory), inside.parent) for path in path.iterdir()}
            assert around == {"a.png", "a.archive", Path(directory).name, "deep", "out"}, f"written outside: {around}"
            assert not any(path.is_symlink() for path in inside.rglob("*"))


# Name -> what makes an input of these random numbers and reads it in a directory; the errors that it may end in
READERS: dict[str, tuple[Callable[[Random, Path], None], type[UserError]]] = {
    "coco": (coco, DataError),
    "via": (read_via, DataError),
    "labelme": (read_labelme, DataError),
    "voc": (read_voc, DataError),
    "cityscapes": (read_cityscapes, DataError),
    "masks": (read_masks, DataError),
    "image": (image, DataError),
    "config": (config, ConfigError),
    "overrides": (overrides, ConfigError),
    "checkpoint": (read_checkpoint, CheckpointError),
    "weights": (weights, CheckpointError),
    "archive": (archive, DataError),
}
# Not integers: hypothesis prefers small ones, of which 13 in 100 come again
CASES = st.binary(min_size=8 * TOGETHER, max_size=8 * TOGETHER)


def attempt(name: str, case: int, root: Path) -> str:
    """ "result" or "error". Raises AssertionError: an error that names neither the file nor a key; and whatever else a
    reader raises."""
    read, expected = READERS[name]
    # Of processor time. faulthandler shows where it was; then the signal ends the process.
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        read(Random(case), root)
    except expected as error:
        named = (str(root), "/etc/passwd", "command line", "config file", "ignore=", *KNOWN)
        assert any(word in str(error) for word in named), f"which file? {error!r}"
        return "error"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "result"


def run(name: str, inputs: int, first_seed: int, root: Path) -> Counter[str]:
    """How many of the inputs, no two of them alike, ended in a result, and how many in an error."""
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    few = settings(deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    for number in itertools.count(first_seed):
        wanted = min(BATCH, inputs - len(seen))
        if wanted <= 0:
            return counts

        @seed(number)
        @settings(few, max_examples=1 + -(-wanted // TOGETHER))  # the first is always all zeros
        @given(CASES)
        def test(drawn):
            for (case,) in struct.iter_unpack(">Q", drawn):
                if case in seen or len(seen) == inputs:
                    continue
                seen.add(case)
                try:
                    counts[attempt(name, case, root)] += 1
                except BaseException as error:
                    error.add_note(f"python test/fuzz.py {name} --case {case}")
                    seen.remove(case)  # hypothesis calls once more, to see whether it happens again
                    raise

        test()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("readers", nargs="+", choices=[*READERS, "all"])
    parser.add_argument("--inputs", type=int, default=1000, help="of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this input alone, as a failure names it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)
    logging.getLogger("maskrcnn_benchmark").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))
    for name in READERS if "all" in arguments.readers else arguments.readers:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
            (Path(root) / "a.png").write_bytes(PICTURE_FILE)
            if arguments.case is not None:
                print(f"{name}: {attempt(name, arguments.case, Path(root))}")
                continue
            counts = run(name, arguments.inputs, arguments.seed, Path(root))
        seconds, most = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(
            f"{name}: {sum(counts.values())} inputs, {counts['result']} results, {counts['error']} errors;"
            f" {seconds:.0f} s, peak {most} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
