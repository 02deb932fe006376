"""Reading labels of still images: COCO instances JSON, whose masks are decoded only where they are asked for."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from pycocotools import mask as coco_mask

from cache.errors import AnnotationError
from cache.labels import masks
from cache.labels.annotations import category_entry, file_name_of, unique_entries
from cache.labels.json_entries import Entry, entries, read_json, show
from cache.labels.masks import Rle
from cache.labels.tracks import Category

_FARTHEST = 10
"""Polygons may reach so many image sizes from the origin; pycocotools draws every pixel of their outlines."""


@dataclass(frozen=True, kw_only=True)
class StillObject:
    """One object of an image; crowds are none."""

    category_id: int
    segmentation: object  # polygons or run lengths, as in the file
    where: str

    def mask(self, height: int, width: int) -> Rle:
        """Decode at the image's size. Raises AnnotationError where the segmentation is no mask of this size."""
        given, entry = self.segmentation, Entry(fields={}, where=self.where)
        try:
            if isinstance(given, dict):
                if given["size"] != [height, width]:
                    entry.fail("the mask's size is not the image's", expected=[height, width], got=given["size"])
                return masks.from_counts([given["counts"]], height, width)[0]
            merged = coco_mask.merge(
                coco_mask.frPyObjects(_polygons(given, _FARTHEST * max(height, width)), height, width)
            )
            return masks.from_counts([merged["counts"].decode("ascii")], height, width)[0]
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, AnnotationError):
                raise
            entry.fail("not a segmentation", expected="polygons or run lengths", got=str(error) or show(given))


@dataclass(frozen=True, kw_only=True)
class Still:
    """A labelled image."""

    id: int
    file_name: str
    height: int
    width: int
    objects: tuple[StillObject, ...]


@dataclass(frozen=True, kw_only=True)
class Stills:
    """A label file of images; `categories` are sorted by id."""

    categories: tuple[Category, ...]
    stills: tuple[Still, ...]


def load_stills(path: Path) -> Stills:
    """Read COCO instances JSON; AnnotationError where it breaks the schema."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise AnnotationError("not a label file", where=path, expected="a JSON object", got=show(data))
    top = Entry(fields=data, where=str(path))
    categories = [category_entry(entry) for entry in unique_entries(top, "categories", "id", "name")]
    images = unique_entries(top, "images", "id")
    known, shown = {category.id for category in categories}, {image.integer("id") for image in images}
    objects: dict[int, list[StillObject]] = defaultdict(list)
    for entry in entries(top.items("annotations"), f"{path}: annotations"):
        image_id, category_id = entry.integer("image_id"), entry.integer("category_id")
        if image_id not in shown or category_id not in known:
            entry.fail("an object of an unknown image or category", got=f"image {image_id}, category {category_id}")
        if entry.fields.get("iscrowd", 0) == 0:
            given = entry.field("segmentation", "polygons or run lengths")
            objects[image_id].append(StillObject(category_id=category_id, segmentation=given, where=entry.where))
    return Stills(
        categories=tuple(sorted(categories, key=lambda category: category.id)),
        stills=tuple(_still(image, tuple(objects[image.integer("id")])) for image in images),
    )


def _still(image: Entry, objects: tuple[StillObject, ...]) -> Still:
    still = Still(
        id=image.integer("id"),
        file_name=file_name_of(image.field("file_name", "a path"), image),
        height=image.integer("height", minimum=1),
        width=image.integer("width", minimum=1),
        objects=objects,
    )
    if still.height * still.width > masks.MAX_PIXELS:
        image.fail("the image is too large", expected=f"at most {masks.MAX_PIXELS} pixels")
    return still


def _polygons(given: object, limit: int) -> list[list[float]]:
    """x, y, x, y, ... of three points or more, each, from -limit to limit."""
    if not isinstance(given, list) or not given:
        raise ValueError(show(given))
    for polygon in given:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon of less than three points")
        for number in polygon:
            if type(number) not in (int, float) or not -limit <= number <= limit:  # False for NaN.
                raise ValueError(f"a coordinate of {show(number)}")
    return [[float(number) for number in polygon] for polygon in given]
