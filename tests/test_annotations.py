"""Label files: what they mean, and one clear error for each way of breaking the schema."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache.errors import AnnotationError
from cache.labels import masks
from cache.labels.annotations import load_labels, parse_labels
from cache.labels.tracks import Labels

GOLDEN = Path(__file__).parent / "golden"
MASK = {"size": [2, 3], "counts": [1, 2, 3]}  # Column by column: two pixels.
Json = dict[str, object]


def label_file() -> dict[str, list[Json]]:
    """Two videos of 2 x 3 pixels; ids are neither contiguous nor sorted."""
    return {
        "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat", "supercategory": "animal"}],
        "videos": [
            {"id": 7, "width": 3, "height": 2, "length": 2, "file_names": ["b/0.jpg", "b/1.jpg"]},
            {"id": 5, "width": 3, "height": 2, "length": 1, "file_names": ["a/0.jpg"]},
        ],
        "annotations": [
            {"id": 1, "video_id": 7, "category_id": 9, "iscrowd": 0, "segmentations": [MASK, None]},
            {
                "id": 2,
                "video_id": 5,
                "category_id": 4,
                "iscrowd": 1,
                "segmentations": [{"size": [2, 3], "counts": "123"}],
                "areas": [2.5],
                "bboxes": [[0, 0, 2, 2]],
                "occlusion": ["slight_occlusion"],
            },
            {"id": 3, "video_id": 7, "category_id": 4, "segmentations": [None, None], "areas": None},
        ],
    }


def test_labels_mean_what_the_file_says() -> None:
    labels = parse_labels(label_file(), "train.json")
    assert [(category.id, category.name) for category in labels.categories] == [(4, "cat"), (9, "dog")]
    assert labels.category_index == {4: 0, 9: 1}
    assert [(video.id, video.name, video.length) for video in labels.videos] == [(7, "b", 2), (5, "a", 1)]
    assert [track.id for track in labels.tracks_of(7)] == [1, 3]
    first, second, third = labels.tracks
    assert first.segmentations[0] == second.segmentations[0], "a list and a string are the same mask"
    assert first.segmentations[0] is not None
    assert masks.mask(first.segmentations[0]).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert (first.areas, second.areas, third.areas) == ((2.0, 0.0), (2.5,), (0.0, 0.0))
    assert (first.iscrowd, second.iscrowd, third.iscrowd) == (False, True, False)
    assert (first.occlusion, second.occlusion) == (None, ("slight_occlusion",))
    assert labels.has_tracks


def test_annotations_without_a_mask_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        parse_labels(label_file(), "unseen.json")
    said = capsys.readouterr().out
    assert said.startswith(
        "warning: unseen.json: 1 annotations have no mask in any frame (id 3): nothing can be learnt"
    )
    assert said.count("\n") == 1


@pytest.mark.parametrize("annotations", ["missing", "null"])
def test_a_split_without_annotations_is_unlabelled(annotations: str) -> None:
    data: Json = {**label_file(), "annotations": None}
    if annotations == "missing":
        del data["annotations"]
    labels = parse_labels(data, "valid.json")
    assert not labels.has_tracks
    assert labels.tracks_of(7) == ()
    assert parse_labels(labels.to_json(), "again") == labels


def test_an_empty_list_of_annotations_is_labelled() -> None:
    assert parse_labels({**label_file(), "annotations": []}, "train.json").has_tracks


def test_subset_keeps_file_order_and_refuses_strangers() -> None:
    labels = parse_labels(label_file(), "train.json")
    part = labels.subset([5])
    assert [video.id for video in part.videos] == [5]
    assert [track.id for track in part.tracks] == [2]
    assert part.categories == labels.categories
    assert [video.id for video in labels.subset([5, 7]).videos] == [7, 5]
    with pytest.raises(AnnotationError, match="ids 6, 8"):
        labels.subset([8, 7, 6])


def test_golden_areas_and_round_trip(tmp_path: Path) -> None:
    path = GOLDEN / "ytvis_eval" / "gt.json"
    labels = load_labels(path)
    raw = json.loads(path.read_text())
    for track, entry in zip(labels.tracks, raw["annotations"], strict=True):
        decoded = [0 if rle is None else int(masks.mask(rle).sum()) for rle in track.segmentations]
        assert decoded == [area or 0 for area in entry["areas"]] == list(track.areas)
    (tmp_path / "again.json").write_text(json.dumps(labels.to_json()))
    assert load_labels(tmp_path / "again.json") == labels


def _set(*path: str | int, to: object) -> Callable[[Json], None]:
    def change(data: Json) -> None:
        *parents, last = path
        target: object = data
        for key in parents:
            target = target[key]  # type: ignore[index]
        if to is ...:
            del target[last]  # type: ignore[attr-defined]
        else:
            target[last] = to  # type: ignore[index]

    return change


FIRST_MASK = ("annotations", 0, "segmentations", 0)
BROKEN: dict[str, tuple[Callable[[Json], None], list[str]]] = {
    "no videos": (_set("videos", to=...), ["train.json", "'videos' is missing"]),
    "no categories": (_set("categories", to=...), ["'categories' is missing"]),
    "empty categories": (_set("categories", to=[]), ["'categories' is empty"]),
    "videos not a list": (_set("videos", to={}), ["'videos' is wrong", "a list"]),
    "annotations not a list": (_set("annotations", to="x"), ["'annotations' is wrong", "'x'"]),
    "entry not an object": (_set("videos", 1, to=3), ["videos[1]", "not an object", "got 3"]),
    "category without name": (
        _set("categories", 1, "name", to=...),
        ["categories[1] (id 4)", "'name' is missing"],
    ),
    "category name a number": (_set("categories", 1, "name", to=3), ["'name' is wrong", "string", "3"]),
    "two categories of one id": (_set("categories", 1, "id", to=9), ["categories[1]", "id 9 occurs twice"]),
    "two categories of one name": (_set("categories", 1, "name", to="dog"), ["name 'dog' occurs twice"]),
    "video without id": (_set("videos", 0, "id", to=...), ["videos[0]", "'id' is missing"]),
    "two videos of one id": (
        _set("videos", 1, "id", to=7),
        ["videos[1] (id 7)", "occurs twice", "videos[0]"],
    ),
    "video id a string": (_set("videos", 0, "id", to="7"), ["videos[0]", "'id' is wrong", "'7'"]),
    "video id a boolean": (_set("videos", 0, "id", to=True), ["'id' is wrong", "True"]),
    "width zero": (_set("videos", 0, "width", to=0), ["videos[0] (id 7)", "'width'", "1 or more", "got 0"]),
    "height missing": (_set("videos", 1, "height", to=...), ["videos[1] (id 5)", "'height' is missing"]),
    "frames too large": (_set("videos", 1, "width", to=2**40), ["videos[1] (id 5)", "too large"]),
    "video of no frames": (_set("videos", 1, "length", to=0), ["videos[1] (id 5)", "'length'", "1 or more"]),
    "too few file names": (
        _set("videos", 0, "file_names", to=["b/0.jpg"]),
        ["id 7", "2 file names", "got 1"],
    ),
    "absolute file name": (
        _set("videos", 0, "file_names", 1, to="/etc/passwd"),
        ["file_names[1]", "/etc/passwd"],
    ),
    "file name upwards": (
        _set("videos", 0, "file_names", 1, to="b/../../x.jpg"),
        ["file_names[1]", "leads out"],
    ),
    "file name upwards, Windows": (_set("videos", 0, "file_names", 1, to="..\\x.jpg"), ["leads out"]),
    "file name with a drive": (_set("videos", 0, "file_names", 1, to="C:x.jpg"), ["leads out"]),
    "file name a number": (_set("videos", 0, "file_names", 0, to=0), ["file_names[0]", "not a file name"]),
    "annotation without id": (_set("annotations", 0, "id", to=...), ["annotations[0]", "'id' is missing"]),
    "two annotations of one id": (
        _set("annotations", 1, "id", to=1),
        ["annotations[1]", "id 1 occurs twice"],
    ),
    "no video_id": (
        _set("annotations", 0, "video_id", to=...),
        ["annotations[0] (id 1)", "'video_id' is missing"],
    ),
    "unknown video": (
        _set("annotations", 0, "video_id", to=6),
        ["(id 1)", "video 6 is unknown", "5, 7", "hint"],
    ),
    "unknown category": (
        _set("annotations", 0, "category_id", to=3),
        ["(id 1)", "category 3 is unknown", "4, 9"],
    ),
    "iscrowd two": (_set("annotations", 0, "iscrowd", to=2), ["(id 1)", "'iscrowd'", "0 or 1", "got 2"]),
    "no segmentations": (
        _set("annotations", 0, "segmentations", to=...),
        ["(id 1)", "'segmentations' is missing"],
    ),
    "too many masks": (
        _set("annotations", 0, "segmentations", to=[None] * 3),
        ["annotations[0] (id 1)", "'segmentations' has the wrong length", "2 items", "got 3 items"],
    ),
    "areas of another length": (_set("annotations", 1, "areas", to=[1, 2]), ["(id 2)", "'areas'", "1 items"]),
    "negative area": (_set("annotations", 1, "areas", to=[-1]), ["areas[0]", "not an area", "got -1"]),
    "area a string": (_set("annotations", 1, "areas", to=["1"]), ["areas[0]", "not an area"]),
    "occlusion of another length": (_set("annotations", 1, "occlusion", to=[]), ["'occlusion'", "1 items"]),
    "occlusion a list": (
        _set("annotations", 1, "occlusion", to=[[]]),
        ["occlusion[0]", "not an occlusion level"],
    ),
    "polygons": (_set(*FIRST_MASK, to=[[0, 0, 1, 1, 2, 2]]), ["segmentations[0]", "polygons", "frPyObjects"]),
    "mask a string": (_set(*FIRST_MASK, to="123"), ["segmentations[0]", "not a mask"]),
    "mask without size": (_set(*FIRST_MASK, to={"counts": "123"}), ["segmentations[0]", "'size' is missing"]),
    "mask without counts": (
        _set(*FIRST_MASK, to={"size": [2, 3]}),
        ["segmentations[0]", "'counts' is missing"],
    ),
    "width before height": (
        _set(*FIRST_MASK, to={"size": [3, 2], "counts": [1, 2, 3]}),
        ["annotations[0] (id 1), segmentations[0]", "[2, 3]", "video 7", "got [3, 2]"],
    ),
    "negative run": (_set(*FIRST_MASK, "counts", to=[-1, 7]), ["segmentations[0]", "'counts'", "-1"]),
    "runs too short": (_set(*FIRST_MASK, "counts", to=[1, 2]), ["2 x 3 = 6", "add up to 3"]),
    "runs too long": (_set(*FIRST_MASK, "counts", to=[1, 2, 4]), ["2 x 3 = 6", "add up to 7"]),
    "run overflows": (_set(*FIRST_MASK, "counts", to=[2**40]), ["segmentations[0]", str(2**40)]),
    "string run overflows": (
        _set(*FIRST_MASK, "counts", to="P" * 9 + "0"),
        ["segmentations[0]", "overflows"],
    ),
    "counts null": (_set(*FIRST_MASK, "counts", to=None), ["segmentations[0]", "NoneType"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_break_of_the_schema_is_one_clear_error(name: str) -> None:
    data: Json = copy.deepcopy(label_file())  # type: ignore[assignment]
    change, expected = BROKEN[name]
    change(data)
    with pytest.raises(AnnotationError) as caught:
        parse_labels(data, "train.json")
    assert str(caught.value).startswith("train.json")
    for words in expected:
        assert words in str(caught.value)


def test_the_broken_frame_is_named_among_good_ones() -> None:
    data = label_file()
    data["annotations"][0]["segmentations"] = [MASK, {"size": [2, 3], "counts": "12"}]
    with pytest.raises(AnnotationError, match=r"annotations\[0\] \(id 1\), segmentations\[1\]: .*add up to 3"):
        parse_labels(data, "train.json")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"videos": [\n  {"id": 1,,}]}', "train.json:2:12: malformed JSON"),
        (b'{"videos": [', "train.json:1:13: malformed JSON"),
        (b"", "train.json:1:1: malformed JSON"),
        (b"\xff\xfe\xff\xff\xff", "train.json: not a JSON file"),
        (b"[" * 100_000, "train.json: not a JSON file"),
        (b"[1]", "expected a JSON object, got a list of 1 items"),
    ],
)
def test_files_that_are_no_labels(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(content)
    with pytest.raises(AnnotationError) as caught:
        load_labels(path)
    assert expected in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"nowhere\.json: the file cannot be read .*No such file"):
        load_labels(tmp_path / "nowhere.json")


def _places(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in [(*path, key), *_places(item, (*path, key))]]


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(st.sampled_from(_places(label_file())), st.just(...) | ANY_JSON)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_damage_is_an_annotation_error_or_harmless(place: tuple[str | int, ...], value: object) -> None:
    data: Json = copy.deepcopy(label_file())  # type: ignore[assignment]
    _set(*place, to=value)(data)
    try:
        labels = parse_labels(data, "train.json")
    except AnnotationError:
        return
    assert isinstance(labels, Labels)
    for track in labels.tracks:
        assert len(track.segmentations) == labels.video_by_id[track.video_id].length


def test_category_maps_are_the_golden_tables() -> None:
    golden = json.loads((GOLDEN / "categories.json").read_text())
    maps = json.loads((Path(__file__).parent.parent / "cache" / "labels" / "category_maps.json").read_text())
    assert set(maps) == {"ytvis_2019", "ytvis_2021", "ovis"}
    for dataset, rows in maps.items():
        names = {category["id"]: category["name"] for category in golden[dataset]}
        assert {str(row["coco_id"]): row["id"] for row in rows} == golden[f"coco_to_{dataset}"]
        assert all(row["name"] == names[row["id"]] for row in rows)
    # Counted by hand: the categories that have a counterpart.
    assert len({row["id"] for row in maps["ytvis_2019"]}) == 19
    assert len({row["id"] for row in maps["ytvis_2021"]}) == 21
