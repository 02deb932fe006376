"""Moving shapes: a seeded data set in YouTube-VIS layout, JPEG folders and JSON, that plays YouTube-VIS.

What makes it hard on purpose: crossings with full occlusion, look-alikes of the same category, objects that leave
and come back, empty frames, categories the detector never saw, and small still objects that nobody labelled.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from cache.errors import ConfigError
from cache.layout import write_file_atomically
from cache.progress import with_progress
from extract.demo.motion import crossing, drift, excursion
from extract.demo.shapes import VIDEO_CATEGORIES, Floats, Sprite, random_background, random_texture, render
from extract.demo.stills import NOT_OURS, new_folder, write_stills

FRAME_SIZES = ((90, 160), (96, 120))  # (height, width): 16:9, which needs padding, and 5:4
MIN_VISIBLE_AREA = 8  # pixels; a sliver smaller than this is "absent", as an annotator would have it
LONG_FRAMES = 300
NUM_STILLS = 300
_SPLIT_SEEDS = {"train": 1, "valid": 2, "long": 3}
_INFO = {"description": "vita-cache moving shapes, generated", "version": "1"}
_FIRST_BYTES = json.dumps({"info": _INFO})[:-1].encode()  # of a label file of ours: others may be of gigabytes


@dataclass(frozen=True, kw_only=True)
class Actor:
    """A shape with its motion over T frames; unlabelled ones are the clutter that annotators skip."""

    sprite: Sprite
    path: Floats  # (T, 2)
    angles: Floats  # (T,)
    radii: Floats  # (T,)
    labelled: bool

    def at(self, frame: int) -> Sprite:
        """Return the sprite as it stands in one frame."""
        return replace(
            self.sprite,
            center_xy=(float(self.path[frame, 0]), float(self.path[frame, 1])),
            angle=float(self.angles[frame]),
            radius=float(self.radii[frame]),
        )


def make_actors(rng: np.random.Generator, background: Floats, num_frames: int) -> list[Actor]:
    """Cast a video: clutter at the back, then 1-4 labelled actors."""
    image_hw = (background.shape[0], background.shape[1])
    scenario = rng.choice(["drift", "crossing", "excursion", "empty"], p=[0.3, 0.4, 0.2, 0.1])
    count = int(rng.integers(2, 4)) if scenario == "crossing" else int(rng.integers(1, 4))
    actors = [_labelled_actor(rng, background, num_frames) for _ in range(count)]
    if count > 1 and rng.random() < 0.5:  # look-alikes
        twin = actors[0].sprite
        actors[1] = replace(actors[1], sprite=replace(actors[1].sprite, category=twin.category, texture=twin.texture))
    if scenario == "crossing":
        behind, front = crossing(rng, image_hw, num_frames)
        actors[0] = replace(actors[0], path=behind, radii=actors[0].radii * 0.75)
        actors[1] = replace(actors[1], path=front, radii=np.maximum(actors[1].radii, 17.0))
    absence = (int(num_frames * rng.uniform(0.25, 0.4)), int(num_frames * rng.uniform(0.6, 0.75)))
    for index in range({"excursion": 1, "empty": count}.get(str(scenario), 0)):
        path = excursion(rng, image_hw, num_frames, float(actors[index].radii.max()), absence)
        actors[index] = replace(actors[index], path=path)
    return [_clutter(rng, background, num_frames) for _ in range(rng.integers(0, 4))] + actors


def _labelled_actor(rng: np.random.Generator, background: Floats, num_frames: int) -> Actor:
    steps = np.arange(num_frames)
    base = float(rng.uniform(16, 26))
    swing = rng.uniform(0, 0.2) * np.sin(steps * rng.uniform(0.1, 0.3) + rng.uniform(0, 6))
    return Actor(
        sprite=_sprite(rng, str(rng.choice(VIDEO_CATEGORIES)), random_texture(rng, background)),
        path=drift(rng, (background.shape[0], background.shape[1]), num_frames),
        angles=rng.uniform(0, 6.28) + steps * rng.uniform(-0.12, 0.12),
        radii=base * (1 + swing),
        labelled=True,
    )


def _clutter(rng: np.random.Generator, background: Floats, num_frames: int) -> Actor:
    grey = random_texture(rng, background)
    grey = 0.25 * grey + 0.75 * grey.mean(axis=-1, keepdims=True)
    place = rng.uniform(0.05, 0.95, 2) * (background.shape[1], background.shape[0])
    return Actor(
        sprite=_sprite(rng, str(rng.choice(VIDEO_CATEGORIES)), grey),
        path=np.tile(place, (num_frames, 1)),
        angles=np.full(num_frames, rng.uniform(0, 6.28)),
        radii=np.full(num_frames, rng.uniform(6, 9)),
        labelled=False,
    )


def _sprite(rng: np.random.Generator, category: str, texture: Floats) -> Sprite:
    stretch = float(np.exp(rng.uniform(-0.18, 0.18)))
    return Sprite(category=category, center_xy=(0, 0), radius=1.0, angle=0.0, stretch=stretch, texture=texture)


def write_video(split: str, video_id: int, folder: Path, num_frames: int | None = None) -> dict[str, Any]:
    """Render video number `video_id` of a split into `folder`/<name>/ and return its JSON entries."""
    rng = np.random.default_rng([_SPLIT_SEEDS[split], video_id])
    image_hw = FRAME_SIZES[video_id % len(FRAME_SIZES)]
    length = int(12 + 29 * rng.random() ** 2) if num_frames is None else num_frames  # 12-40, more short than long
    background = random_background(rng, image_hw)
    actors = make_actors(rng, background, length)
    name = f"shapes_{split}_{video_id:04d}"
    (folder / name).mkdir(parents=True)
    tracks: list[list[NDArray[np.bool_]]] = [[] for _ in actors]
    for frame in range(length):
        image, masks = render(background, [actor.at(frame) for actor in actors], rng)
        Image.fromarray(image).save(folder / name / f"{frame:05d}.jpg", quality=92)
        for track, mask in zip(tracks, masks, strict=True):
            track.append(mask)
    video = {
        "id": video_id,
        "height": image_hw[0],
        "width": image_hw[1],
        "length": length,
        "file_names": [f"{name}/{frame:05d}.jpg" for frame in range(length)],
    }
    annotations = [
        _annotation(video_id, actor.sprite.category, masks)
        for actor, masks in zip(actors, tracks, strict=True)
        if actor.labelled and any(mask.sum() >= MIN_VISIBLE_AREA for mask in masks)
    ]
    return {"video": video, "annotations": annotations}


def _annotation(video_id: int, category: str, masks: list[NDArray[np.bool_]]) -> dict[str, Any]:
    height, width = masks[0].shape
    visible = [mask if mask.sum() >= MIN_VISIBLE_AREA else None for mask in masks]
    encoded = [None if m is None else coco_mask.encode(np.asfortranarray(m, dtype=np.uint8)) for m in visible]
    return {
        "video_id": video_id,
        "category_id": VIDEO_CATEGORIES.index(category) + 1,
        "iscrowd": 0,
        "height": height,
        "width": width,
        "length": len(masks),
        "segmentations": [
            None if rle is None else {"size": [height, width], "counts": rle["counts"].decode("ascii")}
            for rle in encoded
        ],
        "areas": [None if rle is None else int(coco_mask.area(rle)) for rle in encoded],
        "bboxes": [None if rle is None else [float(x) for x in coco_mask.toBbox(rle)] for rle in encoded],
    }


def write_split(root: Path, split: str, num_videos: int, num_frames: int | None = None) -> None:
    """Write `root`/<split>/JPEGImages and `root`/<split>.json; the JSON comes last and marks completeness.

    Raises ConfigError where the folder is there already: it may hold what cannot be generated again.
    """
    with (
        new_folder(root / split / "JPEGImages") as folder,
        ProcessPoolExecutor(max_workers=os.cpu_count()) as pool,
    ):
        jobs = [pool.submit(write_video, split, i, folder, num_frames) for i in range(1, num_videos + 1)]
        entries = [job.result() for job in with_progress(jobs, f"demo data, {split}", unit="video")]
    annotations = [annotation for entry in entries for annotation in entry["annotations"]]
    labels = {
        "info": _INFO,
        "videos": [entry["video"] for entry in entries],
        "categories": [{"id": i, "name": name} for i, name in enumerate(VIDEO_CATEGORIES, start=1)],
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, start=1)],
    }
    write_file_atomically(root / f"{split}.json", json.dumps(labels).encode())


def write_demo_data(
    root: Path, num_train: int = 200, num_valid: int = 50, num_long: int = 0, num_stills: int = 0
) -> None:
    """Write what is not there yet: `num_long` videos of LONG_FRAMES (split `long`), `num_stills` for pseudo-videos.

    Raises ConfigError, before anything is written, where `root` holds another data set.
    """
    splits = (("train", num_train, None), ("valid", num_valid, None), ("long", num_long, LONG_FRAMES))
    missing = [entry for entry in splits if entry[1] and not (root / f"{entry[0]}.json").exists()]
    lacks_stills = num_stills > 0 and not (root / "stills.json").exists()
    if missing or lacks_stills:
        _require_own(root)
    if lacks_stills:
        write_stills(root, num_stills)
    for split, count, length in missing:
        write_split(root, split, count, length)


def _require_own(root: Path) -> None:
    for entry in _entries(root):
        name = entry.name.partition(".")[0]  # of a folder, of labels, of what an interrupted run has left
        if name not in (*_SPLIT_SEEDS, "stills") or (name != "stills" and not _is_own(entry, name)):
            raise ConfigError("not the demo's data, which goes into an empty folder", where=entry, hint=NOT_OURS)


def _is_own(entry: Path, split: str) -> bool:
    """Whether a folder or the labels of a split are what `write_split` writes."""
    if entry.is_file():
        with entry.open("rb") as file:
            return file.read(len(_FIRST_BYTES)) == _FIRST_BYTES
    frames = [folder for folder in _entries(entry) if folder.name.startswith("JPEGImages")]
    videos = [video for folder in frames for video in _entries(folder)]
    return frames == _entries(entry) and all(video.name.startswith(f"shapes_{split}_") for video in videos)


def _entries(folder: Path) -> list[Path]:
    """Of a folder that need not be there; hidden ones are file managers' and editors'."""
    return sorted(entry for entry in folder.glob("*") if not entry.name.startswith("."))
