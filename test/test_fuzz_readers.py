"""Files that others wrote, damaged at random and on purpose: a named error or a result, in bounded time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import fuzz
import numpy as np
import pytest
import torch
from conftest import ROOT

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data import voc
from maskrcnn_benchmark.data.coco import CocoDataset
from maskrcnn_benchmark.data.images import read_image
from maskrcnn_benchmark.errors import ConfigError, DataError
from maskrcnn_benchmark.ops.rle import compress_rle, sound_rle


def python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)


def test_a_share_of_the_fuzzing():
    """The same inputs each time; test/fuzz.py has many more."""
    readers = [name for name in fuzz.READERS if name != "weights"]
    result = python("test/fuzz.py", *readers, "--inputs", "200")
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == readers
    for line in lines:
        _, inputs, _, results, _, errors, *_ = line.replace(":", "").split()
        assert int(inputs) == 200 == int(results) + int(errors)
        assert int(results) > 5 and int(errors) > 5, f"nothing is learnt from inputs that all end alike: {line}"


def test_a_share_of_the_weights():
    result = python("test/fuzz.py", "weights", "--inputs", "300")
    assert result.returncode == 0, result.stderr[-3000:]


def in_little_memory(code: str) -> str:
    """What a process prints that may take 1 GB more than it has after the imports."""
    limit = """
    import resource, json, sys
    from pathlib import Path
    from maskrcnn_benchmark.data import cityscapes, labelme, via
    from maskrcnn_benchmark.data.coco import CocoDataset
    from maskrcnn_benchmark.config import get_config
    from maskrcnn_benchmark.errors import UserError
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30),) * 2)
    """
    result = python("-c", textwrap.dedent(limit) + textwrap.dedent(code))
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def coco_file(root, segmentation, **image) -> str:
    content = json.loads(json.dumps(fuzz.COCO))
    content["annotations"][0]["segmentation"] = segmentation
    content["images"][0] |= image
    (root / "a.png").write_bytes(fuzz.PICTURE_FILE)
    (root / "a.json").write_text(json.dumps(content))
    return str(root / "a.json")


ZIGZAG = [coordinate for n in range(20_000) for coordinate in ((n % 2) * 10**6, n % 7)]


# Name -> segmentation, what the image states, why the annotation is dropped
BOMBS = {
    "zigzag": ([ZIGZAG], {}, "bad_polygon"),
    "far": ([[0, 0, 1e9, 0, 1e9, 1e9]], {}, "bad_polygon"),
    "huge_rle": ({"size": [10**6, 10**6], "counts": [10**12]}, {}, "bad_rle"),
    "expanding_rle": ({"size": [24, 32], "counts": [0, 10**12]}, {}, "bad_rle"),
    "endless_number": ({"size": [24, 32], "counts": "0" + "o" * 100_000 + "0"}, {}, "bad_rle"),
    "huge_image": ([fuzz.SQUARE], {"height": 10**6, "width": 10**6}, None),
}


def test_coco_bombs(tmp_path):
    """Each file is small; drawing what it says would take between 4 GB and a terabyte."""
    for name, (segmentation, image, _) in BOMBS.items():
        (tmp_path / name).mkdir()
        coco_file(tmp_path / name, segmentation, **image)
    said = in_little_memory(f"""
    for name in {list(BOMBS)}:
        root = Path({str(tmp_path)!r}) / name
        data, error = CocoDataset(root / "a.json", root, True), ""
        try:
            for index in range(len(data)):
                data.load(index).drawn()
        except UserError as problem:
            error = str(problem)
        print(json.dumps([data.warnings, error]))
    """)
    for (_, _, dropped), line in zip(BOMBS.values(), said.splitlines(), strict=True):
        warnings, error = json.loads(line)
        if dropped:
            assert warnings[dropped] == [1] and not error
        else:
            assert "a.png (image id 1) is 24 x 32 (height x width), but its annotation file says 1000000 x" in error


def test_a_long_polygon_of_short_steps_is_drawn(tmp_path):
    """A million points that go around for real are a mask like any other."""
    turn = np.linspace(0, 2 * np.pi, 1_000_000, endpoint=False)
    points = np.stack([16 + 8 * np.cos(turn), 12 + 8 * np.sin(turn)], axis=1)
    data = CocoDataset(coco_file(tmp_path, [points.ravel().tolist()]), tmp_path, True)
    assert abs(int(data.load(0).drawn()[0].sum()) - np.pi * 64) < 10


@pytest.mark.parametrize("runs", [[100], [100, 50], [769], [0, 769], [100, 50, 10**9], [2**33, 1]])
def test_rles_of_another_length_than_their_image_are_unsound(runs):
    """pycocotools leaves what a short one lacks as it finds the memory, and stops at a long one."""
    text = compress_rle(torch.tensor(runs), torch.tensor([0, len(runs)]))[0]
    assert sound_rle({"size": [24, 32], "counts": text}, 24, 32) is None
    whole = compress_rle(torch.tensor([100, 50, 618]), torch.tensor([0, 3]))[0]
    assert sound_rle({"size": [24, 32], "counts": whole}, 24, 32)[1] == 50


def test_canvases_of_stated_sizes_are_not_believed(tmp_path):
    mask = fuzz.base64.b64encode(fuzz.MAP_FILE).decode()
    label = {"shapes": [fuzz._LABELS[3] | {"mask": mask}], "imagePath": "a.png", "imageHeight": 10**6}
    (tmp_path / "l").mkdir()
    (tmp_path / "l" / "a.png").write_bytes(fuzz.PICTURE_FILE)
    (tmp_path / "l" / "a.json").write_text(json.dumps(label | {"imageWidth": 10**6}))
    for directory, name, content in (
        ("leftImg8bit", "a_leftImg8bit.png", fuzz.PICTURE_FILE),
        (
            "gtFine",
            "a_gtFine_polygons.json",
            json.dumps({"imgHeight": 10**6, "imgWidth": 10**6, "objects": []}).encode(),
        ),
    ):
        (tmp_path / directory / "train" / "c").mkdir(parents=True)
        (tmp_path / directory / "train" / "c" / name).write_bytes(content)
    circle = {"shape_attributes": {"name": "circle", "cx": 1, "cy": 1, "r": 1e14}, "region_attributes": {}}
    (tmp_path / "v.json").write_text(json.dumps({"a": {"filename": "l/a.png", "regions": [circle]}}))
    said = in_little_memory(f"""
    root = Path({str(tmp_path)!r})
    print(labelme.read(root / "l").content["images"][0]["height"])
    for read, path in ((cityscapes.read, root), (via.read, root / "v.json")):
        try:
            read(path)
        except UserError as error:
            print(error)
    """)
    height, drawn, circle = said.splitlines()
    assert height == "24"
    assert "a_gtFine_polygons.json says that its image is (1000000, 1000000)" in drawn
    assert "v.json: region 0 of l/a.png is damaged" in circle and "1e+14" in circle


@pytest.mark.parametrize("side", [10**6, 30_000, 60_000])
def test_pictures_that_promise_too_much(tmp_path, side):
    (tmp_path / "a.png").write_bytes(fuzz.png_of_size(side, side))
    with pytest.raises(DataError, match=r"a\.png \(image id 7\) is damaged"):
        read_image(tmp_path / "a.png", (24, 32), 7)


def test_pieces_longer_than_the_file(tmp_path):
    """OpenCV takes the memory that a piece of a PNG states, and fills it: 2 GB here."""
    at = fuzz.PICTURE_FILE.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(fuzz.PICTURE_FILE[:at] + b"\x7f\xff\xff\xf0" + fuzz.PICTURE_FILE[at + 4 :])
    with pytest.raises(DataError, match=r"a\.png is damaged: a piece of it is longer than the file"):
        read_image(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(fuzz.PICTURE_FILE)
    assert read_image(tmp_path / "a.png").shape == (24, 32, 3)


def test_yaml_that_grows(tmp_path):
    """Nine lines of ten aliases each to the line above are a thousand million values; a circle has no end."""
    lines = ["a0: &a0 {x: 1}"]
    lists = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    dicts = [f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(10))}}}" for n in range(1, 10)]
    merges = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 10)]
    files = {"lists": lists, "dicts": dicts, "merges": merges, "circle": ["b: &b [*b]"]}
    for name, rest in files.items():
        (tmp_path / f"{name}.yaml").write_text("\n".join(lines + rest))
    said = in_little_memory(f"""
    for name in {list(files)}:
        try:
            get_config(Path({str(tmp_path)!r}) / f"{{name}}.yaml")
        except UserError as error:
            print(error)
    """)
    for name, line in zip(files, said.splitlines(), strict=True):
        assert f"{name}.yaml has more than 100,000 values" in line
    (tmp_path / "few.yaml").write_text("INPUT: {MIN_SIZE_TRAIN: &s [640, 800]}\nTEST: {BBOX_AUG: {SCALES: *s}}")
    assert tuple(get_config(tmp_path / "few.yaml").TEST.BBOX_AUG.SCALES) == (640, 800)


@pytest.mark.parametrize("depth", [1000, 100_000])
def test_deep_nesting(tmp_path, depth):
    text = "[" * depth + "]" * depth
    (tmp_path / "a.json").write_text('{"images": ' + text + "}")
    with pytest.raises(DataError, match=r"a\.json"):
        CocoDataset(tmp_path / "a.json", tmp_path, True)
    (tmp_path / "a.yaml").write_text(f"DATASETS: {{TRAIN: {text}}}")
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        get_config(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match=r"DATASETS\.TRAIN"):
        get_config(None, ["DATASETS.TRAIN", "(" * depth])


def test_xml_that_grows(tmp_path):
    entities = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
    text = f'<!DOCTYPE x [<!ENTITY a0 "{"x" * 100}">{entities}]><annotation><filename>&a9;</filename></annotation>'
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "a.xml").write_text(text)
    with pytest.raises(DataError, match=r"a\.xml is not valid XML.*amplification"):
        voc.read(tmp_path)
