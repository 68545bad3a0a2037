"""tools/predict.py on files, directories, patterns and videos; evaluation over ranks, beside training and augmented."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_keypoint_head import KEYPOINTS
from test_models import SMALL, TINY

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data.images import read_image
from maskrcnn_benchmark.data.synthetic import generate
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.engine import checkpoint, views
from maskrcnn_benchmark.engine.predict import load_predictor, save_predictor
from maskrcnn_benchmark.errors import CheckpointError
from maskrcnn_benchmark.models import augment
from maskrcnn_benchmark.models.build import build_model
from maskrcnn_benchmark.structures import ImageBatch

PREDICT, TEST, TRAIN = "tools/predict.py", "tools/test_net.py", "tools/train_net.py"


@pytest.fixture(scope="module")
def weights(run, tiny_config, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("weights")
    done = run(TRAIN, "--config-file", tiny_config, "--device", "cpu", "--skip-test", "OUTPUT_DIR", output)
    assert done.returncode == 0, done.stderr[-2000:]
    return output / "model_final.pth"


@pytest.fixture
def predict(run, weights, tmp_path):
    """Runs predict.py; returns its process and the results of all scores."""

    def call(*arguments, status: int = 0) -> tuple[subprocess.CompletedProcess, list[dict]]:
        out = tmp_path / "results.json"
        done = run(PREDICT, *arguments, "--weights", weights, "--json", out, "--threshold", "0", "--device", "cpu")
        assert done.returncode == status, done.stderr[-2000:]
        return done, json.loads(out.read_text()) if status < 2 else []

    return call


def same(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        np.testing.assert_allclose(a["bbox"], b["bbox"], atol=1e-2)
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)


def test_a_batch_gives_what_single_images_give(predict, shapes):
    """Of images of one size: where sizes differ, padding changes what the borders see, in all peers too."""
    same(predict(shapes / "val2017", "--batch", "1")[1], predict(shapes / "val2017", "--batch", "3")[1])


@pytest.fixture
def pictures(shapes, tmp_path) -> Path:
    """数据/图 1.png, 数据/深/x[1].jpg and a damaged 数据/坏.jpg."""
    directory = tmp_path / "数据"
    (directory / "深").mkdir(parents=True)
    image = read_image(next((shapes / "val2017").iterdir()))
    for name, size in (("图 1.png", (96, 96)), ("深/x[1].jpg", (150, 60))):
        (directory / name).write_bytes(cv2.imencode(Path(name).suffix, cv2.resize(image, size))[1].tobytes())
    (directory / "坏.jpg").write_bytes((directory / "深/x[1].jpg").read_bytes()[:700])
    return directory


def test_names_in_any_script_patterns_and_damaged_files(predict, pictures, tmp_path):
    done, results = predict(f"{pictures}/**/*.*g", "--batch", "2", "--output", tmp_path / "画", status=1)
    assert sum("坏.jpg" in line for line in done.stderr.splitlines()) == 1 and "1 files unreadable" in done.stdout
    assert sorted(path.name for path in (tmp_path / "画").iterdir()) == ["x[1].jpg.png", "图 1.png.png"]
    assert {result["file_name"] for result in results} == {f"{pictures}/图 1.png", f"{pictures}/深/x[1].jpg"}
    for result in results:
        height, width = (96, 96) if "图" in result["file_name"] else (60, 150)
        assert result["segmentation"]["size"] == [height, width]
        x, y, w, h = result["bbox"]
        assert x >= 0 and y >= 0 and x + w <= width + 1e-6 and y + h <= height + 1e-6
    assert len(predict(pictures / "深" / "x[1].jpg")[1]) > 0  # a file, not a pattern


def test_patterns_that_match_nothing_are_named(predict, tmp_path):
    done, _ = predict(tmp_path / "*.jpg", status=2)
    assert done.stderr.startswith("error:") and "*.jpg" in done.stderr and done.stderr.count("\n") == 1


def test_names_are_as_many_as_the_model_has_classes(weights, tmp_path):
    content = checkpoint.read(weights)
    content["category_names"].pop()
    torch.save(content, tmp_path / "few.pth")
    with pytest.raises(CheckpointError, match=r"few\.pth names 4 categories by 5 ids, but MODEL\.ROI_BOX_HEAD"):
        load_predictor(tmp_path / "few.pth", get_device("cpu"))


def test_proposals_are_named_so(weights, tiny_config, tmp_path):
    cfg = get_config(tiny_config, ["MODEL.RPN_ONLY", "True", "MODEL.MASK_ON", "False"])
    trained = load_predictor(weights, get_device("cpu"))
    save_predictor(replace(trained, cfg=cfg, model=build_model(cfg, trained.device)), tmp_path / "rpn.pth")
    assert load_predictor(tmp_path / "rpn.pth", trained.device).category_names == {1: "proposal"}


def test_videos_frame_by_frame(predict, shapes, tmp_path):
    video, frames = tmp_path / "影片.avi", 5
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 96))
    image = cv2.imread(str(next((shapes / "val2017").iterdir())))
    for shift in range(frames):
        writer.write(np.roll(image, 10 * shift, 1))
    writer.release()
    if not video.exists() or not video.stat().st_size:
        pytest.skip("this OpenCV writes no MJPEG video")
    _, results = predict(video, "--batch", "2", "--output", tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == frames
    assert {result["frame"] for result in results} <= set(range(frames)) and len({r["image_id"] for r in results}) > 1
    video.write_bytes(b"not a video")
    assert "影片.avi" in predict(video, status=1)[0].stderr


# ------------------------------------------------------------------------------------------------ evaluation


def test_accuracy_does_not_depend_on_the_number_of_ranks(run, weights, tiny_config, tmp_path):
    """21 images on 2 ranks: a sampler that pads would count an image twice."""
    generate(tmp_path / "data", train_images=1, val_images=21, size=(96, 96), seed=5)
    common = ("--config-file", tiny_config, "--device", "cpu", "--ckpt", weights, "DATA.PATH", tmp_path / "data")
    scores, found = [], []
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        done = run(TEST, *common, "OUTPUT_DIR", output, "TEST.IMS_PER_BATCH", ranks, ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
        result = json.loads((output / "result.json").read_text())
        scores.append({task: result[task] for task in ("bbox", "segm", "images")})
        found.append(json.loads(next((output / "inference").glob("*[!s].json")).read_text()))
    assert scores[0] == scores[1] and scores[0]["images"] == 21
    order = [sorted(results, key=lambda r: (r["image_id"], -r["score"], r["bbox"])) for results in found]
    assert order[0] == order[1] and len(order[0]) > 21


def test_evaluation_beside_training_gives_the_same(run, tiny_config, tmp_path):
    """Scores of the same iterations, the same best checkpoint, the same weights."""
    outcome = []
    for overlap in ("never", "always"):
        output = tmp_path / overlap
        common = ("--config-file", tiny_config, "--device", "cpu", "OUTPUT_DIR", output, "SOLVER.EVAL_PERIOD", "2")
        done = run(TRAIN, *common, "TEST.OVERLAP", overlap, "SAVE_CHECKPOINTS", "True")
        assert done.returncode == 0, done.stderr[-3000:]
        log = (output / "log.txt").read_text()
        tables = [log[at:].splitlines()[:4] for at in range(len(log)) if log.startswith("accuracy at iteration", at)]
        best = torch.load(output / "model_best.pth", weights_only=True)
        final = torch.load(output / "model_final.pth", weights_only=True)
        scores = json.loads((output / "result.json").read_text())
        outcome.append((tables, best["iteration"], best["best"], final["best"], scores["bbox"], scores["segm"]))
        outcome[-1] += ([tensor.sum().item() for tensor in best["model"].values()],)
    assert len(outcome[0][0]) == 3
    for never, always in zip(*outcome):
        assert never == always


def test_many_large_masks_in_little_memory():
    """300 masks on 12 megapixels would be 3.6 GB as bitmaps; and the same RLEs as one by one, and as from bitmaps."""
    script = """
import resource, torch
from maskrcnn_benchmark.ops import masks
def used(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
generator = torch.Generator().manual_seed(0)
maps = torch.rand(300, 28, 28, generator=generator)
corner = torch.rand(300, 2, generator=generator) * 2000
boxes = torch.cat([corner, corner + 100 + torch.rand(300, 2, generator=generator) * 1900], 1)
masks.paste_masks_rle(maps[:1], boxes[:1], 3000, 4000)
before = used()
rles = masks.paste_masks_rle(maps, boxes, 3000, 4000)
assert rles[::60] == [masks.paste_masks_rle(maps[i:i+1], boxes[i:i+1], 3000, 4000)[0] for i in range(0, 300, 60)]
grown = used() - before
for i in (0, 150, 299):
    drawn = masks.paste_masks_rle_composite(maps[i:i+1], boxes[i:i+1], 3000, 4000, 0.5)  # as a bitmap of 12 megapixels
    assert masks.compress_rle(*drawn)[0] == rles[i]["counts"]
print(grown)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1000


# -------------------------------------------------------------------------------------- test-time augmentation

AUGMENTED = ["TEST.BBOX_AUG.ENABLED", "True", "TEST.BBOX_AUG.H_FLIP", "True"]


@pytest.fixture(scope="module")
def model(tiny_config, weights):
    cfg = get_config(tiny_config, ["MODEL.ROI_HEADS.SCORE_THRESH", "0.0", "MODEL.DEVICE", "cpu"])
    model = build_model(cfg, get_device("cpu")).eval()
    model.load_state_dict(torch.load(weights, weights_only=True)["model"])
    return model


@pytest.fixture(scope="module")
def images() -> ImageBatch:
    """Two images of different size in one padded batch."""
    pixels = torch.zeros(2, 3, 96, 96, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[96, 80], [70, 96]])
    for row, (height, width) in enumerate(sizes.tolist()):
        pixels[row, :, :height, :width] = torch.randint(256, (3, height, width), generator=generator)
    return ImageBatch(pixels, sizes, [(96, 80), (70, 96)], [0, 1])


def mirrored(images: ImageBatch) -> ImageBatch:
    pixels = images.pixels.clone()
    for row, (_, width) in enumerate(images.sizes.tolist()):
        pixels[row, ..., :width] = pixels[row, ..., :width].flip(-1)
    return replace(images, pixels=pixels)


@torch.no_grad()
def test_one_view_is_plain_detection(model, images):
    plain, single = model(images), augment.detect(model, [(images, False)])
    for name in ("boxes", "scores", "labels", "valid", "masks"):
        assert torch.equal(getattr(plain, name), getattr(single, name))


@torch.no_grad()
def test_with_both_views_a_mirrored_image_gives_mirrored_detections(model, images):
    both = [augment.detect(model, [(x, False), (x, True)]) for x in (images, mirrored(images))]
    plain = model(images)
    assert not torch.allclose(plain.scores, both[0].scores)  # the second view has its say
    first, second = both
    flipped = augment._mirror_boxes(second.boxes, images.sizes)
    for row in range(2):
        count = int(first.valid[row].sum())
        assert count == int(second.valid[row].sum()) > 5
        for k in range(count):
            apart = (flipped[row, :count] - first.boxes[row, k]).abs().amax(1) + 1e3 * (
                (second.scores[row, :count] - first.scores[row, k]).abs()
            )
            twin = int(apart.argmin())
            assert apart[twin] < 0.05 and second.labels[row, twin] == first.labels[row, k]
            torch.testing.assert_close(second.masks[row, twin].flip(-1), first.masks[row, k], atol=1e-3, rtol=0)


@torch.no_grad()
def test_mirrored_views_swap_left_and_right_keypoints(images):
    """Where the two views are all there is, a mirrored image has the same points, mirrored, under their other names."""
    torch.manual_seed(0)
    mirror = (0, 2, 1, 4, 3)
    cfg = get_config(SMALL, [*TINY, *KEYPOINTS, "TEST.BBOX_AUG.KEYPOINT_MIRROR", str(mirror)])
    model = build_model(cfg, get_device("cpu")).eval()
    model.roi_heads["box"].score_threshold = 0.0
    torch.nn.init.normal_(model.roi_heads["keypoint"].predictor.kps_score_lowres.weight, std=1.0)
    first, second = (augment.detect(model, [(x, False), (x, True)]) for x in (images, mirrored(images)))
    flipped = augment._mirror_boxes(second.boxes, images.sizes)
    found = 0
    for row, (_, width) in enumerate(images.sizes.tolist()):
        for k in first.valid[row].nonzero().flatten()[:20].tolist():
            apart = (flipped[row] - first.boxes[row, k]).abs().amax(1) + 1e3 * (
                second.labels[row] != first.labels[row, k]
            )
            twin = int(apart.argmin())
            if apart[twin] > 0.01:
                continue
            points = second.keypoints[row, twin][list(mirror)]
            points[:, 0] = width - points[:, 0]
            near = (points[:, :2] - first.keypoints[row, k, :, :2]).abs().amax(1) < 0.1
            found += int(near.sum())
    assert found > 60  # of 200: equal peaks are found at the first of them, from the left in both


@torch.no_grad()
def test_views_of_another_size_are_merged_in_the_first_ones_pixels(model, images):
    larger = replace(
        images,
        pixels=torch.nn.functional.interpolate(images.pixels.float(), scale_factor=2.0, mode="nearest"),
        sizes=images.sizes * 2,
    )
    merged = augment.detect(model, [(images, False), (larger, False)])
    alone = augment.detect(model, [(larger, False)])
    limit = images.sizes.flip(1).repeat(1, 2)[:, None] + 1e-3
    assert (merged.boxes[merged.valid] >= 0).all() and (merged.boxes <= limit)[merged.valid].all()
    best = alone.boxes[:, 0] / 2
    near = (merged.boxes - best[:, None]).abs().amax(-1) < 0.05
    over = merged.scores[:, 0] >= alone.scores[:, 0] - 1e-6
    assert near.any(1).any() and over.all()


def test_views_are_configured_by_upstreams_keys(tiny_config):
    assert [flip for _, flip in views.view_configs(get_config(tiny_config, []))] == [False]
    scales = ["TEST.BBOX_AUG.SCALES", "(64, 128)", "TEST.BBOX_AUG.MAX_SIZE", "200", "DATALOADER.NUM_WORKERS", "4"]
    configs = views.view_configs(get_config(tiny_config, [*AUGMENTED, *scales]))
    loaded = [(view.INPUT.MIN_SIZE_TEST, view.INPUT.MAX_SIZE_TEST, flip) for view, flip in configs]
    assert loaded == [(96, 96, True), (64, 200, False), (128, 200, False)]
    assert {view.DATALOADER.NUM_WORKERS for view, _ in configs} == {1}


def test_augmented_evaluation_runs_end_to_end(run, weights, tiny_config, tmp_path):
    arguments = ("--config-file", tiny_config, "--device", "cpu", "--ckpt", weights, "OUTPUT_DIR", tmp_path, *AUGMENTED)
    arguments += ("TEST.BBOX_AUG.SCALES", "(64,)", "TEST.BBOX_AUG.SCALE_H_FLIP", "True")
    done = run(TEST, *arguments, "TEST.METRICS", "('coco', 'voc07', 'voc', 'cityscapes')")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["segm"]["AP"] is not None and result["voc"]["AP50"] is not None and result["cityscapes"]
    details = json.loads(next((tmp_path / "inference").glob("*_details.json")).read_text())
    assert set(details) == {"bbox", "segm", "confusion", "images"}
    assert "<svg" in next((tmp_path / "inference").glob("*_details.html")).read_text()
