"""From pixels to scores against the real VITA: skipped without detectron2 and a VITA checkout in PYTHONPATH.

The checkpoint is VITA's own `state_dict` with the recorded tiny weights. VITA reads the frames, resizes them
with detectron2 and evaluates the video in one go; we extract, import the head and evaluate from the float16
cache. Measured: scores 7e-5, pixels 0.02 %.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cache.labels.masks import from_counts, mask
from configs.load import load_settings
from evaluate.stage import evaluate
from extract.detector.detectron2_config import read_config
from extract.stage import extract
from tests.cache_samples import labels_of
from tests.detector_samples import GOLDEN, golden_arrays, official_state
from tests.test_release import golden_head_state
from train_head.release import import_file

live = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("detectron2", "mask2former", "vita")),
    reason="needs detectron2 and VITA",
)
LENGTHS = {1: 13, 2: 4, 3: 1}
SHORT_EDGE, ORIGINAL_HW, NUM_CLASSES, TOP_K = 64, (90, 160), 5, 10
SETTINGS = f"""_BASE_: {GOLDEN / "mask2former_tiny_r50" / "config.yaml"}
MODEL:
  META_ARCHITECTURE: Vita
  SEM_SEG_HEAD: {{NUM_CLASSES: {NUM_CLASSES}}}
  MASK_FORMER: {{TRANSFORMER_DECODER_NAME: VitaMultiScaleMaskedTransformerDecoder}}
  VITA: {{HIDDEN_DIM: 64, DIM_FEEDFORWARD: 128, NUM_OBJECT_QUERIES: 15,
         ENC_LAYERS: 3, DEC_LAYERS: 6, ENC_WINDOW_SIZE: 6}}
DATASETS: {{TRAIN: [ytvis_2019_train], TEST: [ytvis_2019_val]}}
TEST: {{DETECTIONS_PER_IMAGE: {TOP_K}}}
INPUT: {{SAMPLING_FRAME_NUM: 5}}
"""


def original_model(folder: Path) -> Any:
    """VITA with the recorded weights of detector and head; five rows and "no object" of the class layer."""
    from detectron2.modeling import build_model

    (folder / "vita.yaml").write_text(SETTINGS)
    model = build_model(read_config(folder / "vita.yaml", torch.device("cpu"))).eval()
    detector = official_state("r50")
    detector["sem_seg_head.predictor.query_feat.weight"] = detector.pop("sem_seg_head.predictor.static_query.weight")
    for name in ("weight", "bias"):
        key = f"sem_seg_head.predictor.class_embed.{name}"
        detector[key] = detector[key][[*range(NUM_CLASSES), -1]]
    state = model.state_dict()
    state.update({k: v for k, v in (detector | golden_head_state()).items() if "empty_weight" not in k})
    model.load_state_dict(state)
    torch.save({"model": model.state_dict(), "iteration": 0}, folder / "vita.pth")
    return model


def original_tracks(model: Any, frames: list[Path]) -> list[tuple[int, float, Any]]:
    from detectron2.data.transforms import ResizeShortestEdge

    images = [np.array(Image.open(frame)) for frame in frames]
    resized = [ResizeShortestEdge(SHORT_EDGE, 1333).get_transform(i).apply_image(i) for i in images]
    video = {"image": [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in resized]}
    with torch.no_grad():
        result = model([video | {"height": ORIGINAL_HW[0], "width": ORIGINAL_HW[1]}])
    masks = result["pred_masks"].numpy()
    return sorted(zip(result["pred_labels"], result["pred_scores"], masks, strict=True), key=lambda track: track[:2])


def pixels(segmentations: list[dict[str, Any] | None]) -> np.ndarray:
    """The masks (T, h, w) of a track in results.json."""
    frames = [np.zeros(ORIGINAL_HW, bool) for _ in segmentations]
    for frame, segmentation in enumerate(segmentations):
        if segmentation is not None:
            frames[frame] = mask(from_counts([segmentation["counts"]], *ORIGINAL_HW)[0]).astype(bool)
    return np.stack(frames)


@live
def test_pixels_to_scores(tmp_path: Path) -> None:
    model = original_model(tmp_path)
    image = golden_arrays("r50", "inputs.npz")["image0"]
    content = json.loads(labels_of(LENGTHS))
    content["categories"] = [{"id": index + 1, "name": f"kind {index}"} for index in range(NUM_CLASSES)]
    for video in content["videos"]:
        video |= {"height": ORIGINAL_HW[0], "width": ORIGINAL_HW[1]}
        video["file_names"] = [name.replace(".jpg", ".png") for name in video["file_names"]]
        for index, name in enumerate(video["file_names"]):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.fromarray(np.roll(image, 9 * index + 40 * video["id"], axis=1)).save(tmp_path / name)
    (tmp_path / "labels.json").write_text(json.dumps(content))
    settings = load_settings(
        "demo",
        [
            *(f"data.root={tmp_path}", "data.train_labels=labels.json", "data.train_frames=."),
            *("data.valid_labels=null", "data.valid_frames=null", "evaluate.split=train"),
            *(f"detector.weights={tmp_path / 'vita.pth'}", f"detector.short_edge={SHORT_EDGE}", "device=cpu"),
            *(f"cache.path={tmp_path / 'cache'}", f"runs={tmp_path / 'runs'}", f"evaluate.top_k={TOP_K}"),
        ],
    )
    extract(settings)
    import_file(tmp_path / "vita.pth", tmp_path / "runs/demo", tmp_path / "cache/train", num_heads=8, window=6)
    results = json.loads((evaluate(settings).folder / "results.json").read_text())
    for video_id, length in LENGTHS.items():
        expected = original_tracks(model, [tmp_path / str(video_id) / f"{index:05}.png" for index in range(length)])
        ours = sorted(
            ((r["category_id"] - 1, r["score"], r["segmentations"]) for r in results if r["video_id"] == video_id),
            key=lambda track: track[:2],
        )
        assert [track[0] for track in ours] == [track[0] for track in expected]
        assert [track[1] for track in ours] == pytest.approx([track[1] for track in expected], abs=5e-4)
        different = [(pixels(ours[i][2]) != expected[i][2]).mean() for i in range(TOP_K)]
        assert max(different) < 1e-3
