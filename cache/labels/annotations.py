"""Reading label files: YTVIS JSON (youtube-vos.org, Video Instance Segmentation), checked entry by entry.

YouTube-VIS 2019 and 2021, OVIS and any data set of one's own in the same schema. Whatever breaks the schema
is one AnnotationError that names the file, the entry, the field, what was expected and what was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath

from cache.errors import AnnotationError, some
from cache.labels import masks
from cache.labels.json_entries import Entry, entries, read_json, show
from cache.labels.masks import Rle
from cache.labels.tracks import Category, Labels, Occlusion, Track, Video, mask_areas
from cache.progress import warn_once


def load_labels(path: Path | str) -> Labels:
    """Read and check a YTVIS JSON file; AnnotationError where it breaks the schema."""
    return parse_labels(read_json(Path(path)), str(path))


def parse_labels(data: object, where: str) -> Labels:
    """Check parsed YTVIS JSON; `where` names it in errors. No (or null) `annotations`: unlabelled."""
    if not isinstance(data, dict):
        raise AnnotationError("not a label file", where=where, expected="a JSON object", got=show(data))
    top = Entry(fields=data, where=where)
    categories = [category_entry(entry) for entry in unique_entries(top, "categories", "id", "name")]
    if not categories:
        top.fail("field 'categories' is empty", expected="at least one category")
    videos = [_video(entry) for entry in unique_entries(top, "videos", "id")]
    labels = Labels(
        categories=tuple(sorted(categories, key=lambda category: category.id)),
        videos=tuple(videos),
        tracks=(),
        has_tracks=data.get("annotations") is not None,
    )
    if not labels.has_tracks:
        return labels
    tracks = tuple(_track(entry, labels) for entry in unique_entries(top, "annotations", "id"))
    if unseen := [track.id for track in tracks if not any(track.segmentations)]:
        what = f"{len(unseen)} annotations have no mask in any frame (id {some(unseen)})"
        warn_once(
            f"{where}: {what}: nothing can be learnt from them, and scores count them as objects that were missed"
        )
    return replace(labels, tracks=tracks)


def video_of(entry: Entry, labels: Labels) -> Video:
    """The video that an annotation or a prediction belongs to."""
    video_id = entry.integer("video_id")
    if video_id not in labels.video_by_id:
        entry.fail(
            f"video {video_id} is unknown",
            expected=f"one of the ids {some(sorted(labels.video_by_id))}",
            hint="Every video_id must be listed under 'videos' of the label file; is it the right split?",
        )
    return labels.video_by_id[video_id]


def category_of(entry: Entry, labels: Labels) -> int:
    """The category id of an annotation or a prediction."""
    category_id = entry.integer("category_id")
    if category_id not in labels.category_index:
        entry.fail(
            f"category {category_id} is unknown",
            expected=f"one of the ids {some(labels.category_index)}",
            hint="Every category_id must be listed under 'categories' of the label file.",
        )
    return category_id


def segmentations_of(entry: Entry, video: Video) -> tuple[Rle | None, ...]:
    """One mask or None per frame of the video, normalised to compressed run lengths."""
    items = entry.items("segmentations", length=video.length)
    counts = {frame: _counts(item, video, _frame(entry, frame)) for frame, item in enumerate(items) if item is not None}
    try:
        rles = masks.from_counts(list(counts.values()), video.height, video.width)
    except ValueError:
        rles = [_one_mask(item, video, _frame(entry, frame)) for frame, item in counts.items()]
    by_frame = dict(zip(counts, rles, strict=True))
    return tuple(by_frame.get(frame) for frame in range(video.length))


def unique_entries(top: Entry, name: str, *keys: str) -> list[Entry]:
    """The entries of a list, no two of which may share a key."""
    found = entries(top.items(name), f"{top.where}: {name}")
    for key in keys:
        seen: dict[object, Entry] = {}
        for entry in found:
            value = entry.integer(key) if key == "id" else entry.text(key)
            if value in seen:
                entry.fail(f"{key} {value!r} occurs twice", expected=f"a {key} of its own", got=seen[value].where)
            seen[value] = entry
    return found


def category_entry(entry: Entry) -> Category:
    """A category of a label file."""
    return Category(id=entry.integer("id"), name=entry.text("name"))


def _video(entry: Entry) -> Video:
    names = entry.items("file_names")
    video = Video(
        id=entry.integer("id"),
        width=entry.integer("width", minimum=1),
        height=entry.integer("height", minimum=1),
        length=entry.integer("length", minimum=1),
        file_names=tuple(file_name_of(name, _frame(entry, frame, "file_names")) for frame, name in enumerate(names)),
    )
    if len(names) != video.length:
        entry.fail("'length' and 'file_names' disagree", expected=f"{video.length} file names", got=len(names))
    if video.width * video.height > masks.MAX_PIXELS:
        size = f"{video.width} x {video.height}"
        entry.fail("the frames are too large", expected=f"at most {masks.MAX_PIXELS} pixels", got=size)
    return video


def file_name_of(name: object, where: Entry) -> str:
    """A path that stays inside the image folder, on any system."""
    expected = "a path relative to the image folder, without '..'"
    if not isinstance(name, str) or not name or "\0" in name:
        where.fail("not a file name", expected=expected, got=show(name))
    path = PureWindowsPath(name)  # Takes / and \ as separators: a superset of what leads out on POSIX.
    if path.anchor or ".." in path.parts:
        where.fail("a file name leads out of the image folder", expected=expected, got=show(name))
    return name


def _track(entry: Entry, labels: Labels) -> Track:
    video = video_of(entry, labels)
    segmentations = segmentations_of(entry, video)
    iscrowd = entry.integer("iscrowd") if "iscrowd" in entry.fields else 0
    if iscrowd not in (0, 1):
        entry.fail("field 'iscrowd' is wrong", expected="0 or 1", got=iscrowd)
    return Track(
        id=entry.integer("id"),
        video_id=video.id,
        category_id=category_of(entry, labels),
        iscrowd=bool(iscrowd),
        segmentations=segmentations,
        areas=_areas(entry, segmentations),
        occlusion=_occlusion(entry, video.length),
    )


def _areas(entry: Entry, segmentations: Sequence[Rle | None]) -> tuple[float, ...]:
    if entry.fields.get("areas") is None:
        return mask_areas(segmentations)
    areas = []
    for frame, item in enumerate(entry.items("areas", length=len(segmentations))):
        area = 0 if item is None else item
        if not isinstance(area, int | float) or not 0 <= area <= masks.MAX_PIXELS:
            _frame(entry, frame, "areas").fail("not an area", expected="pixels, or null", got=show(item))
        areas.append(float(area))
    return tuple(areas)


def _occlusion(entry: Entry, length: int) -> tuple[Occlusion, ...] | None:
    if entry.fields.get("occlusion") is None:
        return None
    levels: list[Occlusion] = []
    for frame, item in enumerate(entry.items("occlusion", length=length)):
        if item is not None and not isinstance(item, int | float | str):
            _frame(entry, frame, "occlusion").fail(
                "not an occlusion level", expected="a number or text", got=show(item)
            )
        levels.append(item)
    return tuple(levels)


def _counts(item: object, video: Video, where: Entry) -> object:
    """The `counts` of one frame's mask, whose size must be the video's."""
    if isinstance(item, list):
        where.fail(
            "polygons instead of run lengths",
            expected="{'size': [h, w], 'counts': ...} or null",
            got=show(item),
            hint="Convert: pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, h, w)).",
        )
    if not isinstance(item, dict):
        where.fail("not a mask", expected="{'size': [h, w], 'counts': ...} or null", got=show(item))
    rle = Entry(fields=item, where=where.where)
    size = rle.items("size")
    if size != [video.height, video.width]:
        expected = f"[{video.height}, {video.width}] (height, width of video {video.id})"
        rle.fail("the mask's size is not the video's", expected=expected, got=size)
    return rle.field("counts", "run lengths")


def _one_mask(counts: object, video: Video, where: Entry) -> Rle:
    try:
        return masks.from_counts([counts], video.height, video.width)[0]
    except ValueError as error:
        expected = f"non-negative runs adding up to {video.height} x {video.width} = {video.height * video.width}"
        where.fail("the mask's 'counts' are broken", expected=expected, got=str(error))


def _frame(entry: Entry, frame: int, name: str = "segmentations") -> Entry:
    """The place of one frame of an entry."""
    return replace(entry, where=f"{entry.where}, {name}[{frame}]")
