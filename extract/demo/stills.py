"""Seeded still images with instance masks: all that the demo's detector ever sees, and others that play COCO."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cache.errors import ConfigError
from cache.labels import masks
from cache.layout import write_file_atomically
from cache.progress import with_progress
from extract.demo.shapes import (
    DETECTOR_CATEGORIES,
    VIDEO_CATEGORIES,
    Floats,
    Sprite,
    random_background,
    random_texture,
    render,
)

LABELLED_CATEGORIES = (*VIDEO_CATEGORIES, "heart", "ell")  # as COCO does, they know more than the videos show
LABELLED_SIZE = (120, 160)  # height, width
NOT_OURS = (
    "name your data's config (any YTVIS JSON: CONFIG=ytvis2019_r50), or an empty data.root for the demo, the default; "
    "delete what an old demo has left"
)
_DETECTORS, _LABELLED = 7, 8  # streams of random numbers: no image is in both


@dataclass(frozen=True, kw_only=True)
class Still:
    """An image (h, w, 3) uint8 with N visible masks (N, h, w) and classes (N) into its categories."""

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    classes: NDArray[np.int64]


def make_still(seed: int, image_hw: tuple[int, int]) -> Still:
    """Draw still number `seed` of the detector's world, its classes into DETECTOR_CATEGORIES."""
    return _draw_still(np.random.default_rng([_DETECTORS, seed]), image_hw, DETECTOR_CATEGORIES)


def write_stills(root: Path, count: int) -> None:
    """Write `root`/stills and, last, `root`/stills.json (COCO instances JSON), for pseudo-videos.

    Raises ConfigError where the folder is there already.
    """
    height, width = LABELLED_SIZE
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    with new_folder(root / "stills") as folder:
        for number in with_progress(range(1, count + 1), "demo data, stills", unit="image"):
            still = _draw_still(np.random.default_rng([_LABELLED, number]), LABELLED_SIZE, LABELLED_CATEGORIES)
            name = f"{number:05d}.jpg"
            Image.fromarray(still.image).save(folder / name, quality=92)
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            for mask, label in zip(still.masks, still.classes.tolist(), strict=True):
                rle = masks.encode(mask).to_json()
                annotation = {"image_id": number, "category_id": label + 1, "iscrowd": 0, "segmentation": rle}
                annotations.append({"id": len(annotations) + 1, **annotation})
    categories = [{"id": index, "name": name} for index, name in enumerate(LABELLED_CATEGORIES, start=1)]
    labels = {"images": images, "annotations": annotations, "categories": categories}
    write_file_atomically(root / "stills.json", json.dumps(labels).encode())


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which becomes `folder` when the block ends without an error.

    Raises ConfigError where `folder` exists: it may hold what nobody can generate again.
    """
    if folder.exists():
        raise ConfigError("this folder is there already, without its labels", where=folder, hint=NOT_OURS)
    temporary = folder.with_name(f"{folder.name}.generated")
    shutil.rmtree(temporary, ignore_errors=True)  # what an interrupted run has left
    temporary.mkdir(parents=True)
    yield temporary
    temporary.rename(folder)


def _draw_still(rng: np.random.Generator, image_hw: tuple[int, int], categories: tuple[str, ...]) -> Still:
    """1-6 shapes, in one image in two a pair that nearly covers each other."""
    background = random_background(rng, image_hw)
    sprites = [_random_sprite(rng, background, categories) for _ in range(rng.integers(1, 7))]
    if len(sprites) > 1 and rng.random() < 0.5:
        x, y = np.array(sprites[0].center_xy) + rng.normal(0, 0.8, 2) * sprites[0].radius
        sprites[1] = replace(sprites[1], center_xy=(float(x), float(y)))
    if len(sprites) > 1 and rng.random() < 0.3:  # look-alikes
        sprites[-1] = replace(sprites[-1], category=sprites[0].category, texture=sprites[0].texture)
    image, masks = render(background, sprites, rng)
    keep = [index for index, mask in enumerate(masks) if mask.sum() >= 20]
    return Still(
        image=image,
        masks=np.stack([masks[i] for i in keep]) if keep else np.zeros((0, *image_hw), dtype=bool),
        classes=np.array([categories.index(sprites[i].category) for i in keep], dtype=np.int64),
    )


def _random_sprite(rng: np.random.Generator, background: Floats, categories: tuple[str, ...]) -> Sprite:
    height, width = background.shape[:2]
    return Sprite(
        category=str(rng.choice(categories)),
        center_xy=(float(rng.uniform(-4, width + 4)), float(rng.uniform(-4, height + 4))),
        radius=float(rng.uniform(8, 27)),
        angle=float(rng.uniform(0, 2 * np.pi)),
        stretch=float(np.exp(rng.uniform(-0.18, 0.18))),
        texture=random_texture(rng, background),
    )
