"""What forces re-extraction and what does not: every row of the table in cache/FORMAT.md."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from cache.codecs.float16 import Float16
from cache.errors import AnnotationError, CorruptData, FingerprintMismatch
from cache.fingerprint import Fingerprint, Provenance, sha256_file, source_digest
from cache.layout import View, video_group_name
from cache.reader import FeatureCache
from cache.writer import CacheWriter
from tests.cache_samples import FINGERPRINT, labels_of, open_writer, random_heads, write_video

TESTS = Path(__file__).parent

OTHER_VALUES: dict[str, Any] = {
    "weights_sha256": "cd" * 32,
    "architecture": "another",
    "num_layers": 4,
    "short_edge": 480,
    "pixel_mean": (0.0, 0.0, 0.0),
    "pixel_std": (1.0, 1.0, 1.0),
    "padding_divisor": 64,
    "precision": "bf16",
    "codec": "int8",
    "decoder": "torchvision",
    "format_version": 2,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A cache with videos 1 and 2."""
    writer = open_writer(tmp_path / "features", labels_of({1: 5, 2: 3}))
    write_video(writer, "1", 5)
    write_video(writer, "2", 3)
    return tmp_path / "features"


def test_the_digest_is_that_of_canonical_json() -> None:
    text = (
        '{"architecture":"tiny","codec":"float16","format_version":1,"num_layers":3,"padding_divisor":32,'
        '"pixel_mean":[123.675,116.28,103.53],"pixel_std":[58.395,57.12,57.375],"precision":"float32",'
        '"short_edge":24,"weights_sha256":"' + "ab" * 32 + '"}'
    )
    assert FINGERPRINT.digest() == hashlib.sha256(text.encode()).hexdigest()


def test_equal_numbers_have_equal_digests() -> None:
    whole, real = (replace(FINGERPRINT, pixel_std=std) for std in ((1, 1, 1), (1.0, 1.0, 1.0)))
    assert whole == real and whole.digest() == real.digest()


def test_every_field_is_covered_here() -> None:
    assert OTHER_VALUES.keys() == {entry.name for entry in fields(Fingerprint)}


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_each_field_changes_the_digest_and_is_named(field: str) -> None:
    other = replace(FINGERPRINT, **{field: OTHER_VALUES[field]})
    assert other.digest() != FINGERPRINT.digest()
    (difference,) = FINGERPRINT.differences(other)
    assert difference.endswith("there") and str(OTHER_VALUES[field])[:12] in difference
    with pytest.raises(FingerprintMismatch, match=r"somewhere: .*\n  hint: do this"):
        FINGERPRINT.require(other, where="somewhere", hint="do this")


def test_it_survives_the_cache(path: Path) -> None:
    stored = FeatureCache.open(path).fingerprint
    assert stored == FINGERPRINT
    assert stored.differences(FINGERPRINT) == []
    stored.require(FINGERPRINT, where=path, hint="")


@pytest.mark.parametrize("stored", [{}, {"weights_sha256": "x"}, {**FINGERPRINT.to_json(), "colour": 1}, 3])
def test_unreadable_fingerprints_are_refused(stored: Any) -> None:
    with pytest.raises(CorruptData, match=r"here: .*fingerprint"):
        Fingerprint.from_json(stored, where="here")


# The table of FORMAT.md

TABLE = {
    "detector weights, architecture or number of stored layers": "test_row_changed_features_need_another_cache",
    "decoder of the frames": "test_frames.py::test_another_decoder_needs_another_cache",
    "short edge, mean, deviation, padding divisor, precision": "test_row_changed_features_need_another_cache",
    "codec, or another fit of the same codec": "test_codec_storage.py::test_another_fit_is_another_cache",
    "settings of the fit": "test_codec_extraction.py::test_a_continued_cache_keeps_its_fit",
    "format version": "test_cache_store.py::test_other_format_versions_are_refused",
    "videos added to the label file": "test_row_added_videos_are_the_only_ones_extracted",
    "videos removed from the label file": "test_row_removed_videos_stay_unused",
    "objects, masks, categories or": "test_row_changed_objects_and_categories_only_replace_the_label_file",
    "no label file given": "test_row_no_label_file_keeps_the_old_one",
    "a video's frames renamed, reordered": "test_row_other_frames_under_a_known_name_are_refused",
    "pixels changed under the same file names": "test_row_changed_pixels_are_not_noticed",
    "a view added": "test_row_added_views_are_extracted_beside",
    "a view changed": "test_row_a_changed_view_is_another_view",
    "crops of pseudo-videos changed": "test_pseudo.py::test_more_images_only_extend_and_other_crops_are_refused",
    "`detector.batch_frames`, threads, device": "test_extraction_batches.py::test_features_are_those_of_single_frames",
    "library versions, host, device, date, paths": "test_row_provenance_never_matters",
    "extraction interrupted": "test_cache_store.py::test_killed_at_any_moment_and_resumed_gives_the_same_bytes",
}
"""How each row begins, and its test."""


def test_every_row_has_a_test_and_every_test_a_row() -> None:
    section = (TESTS.parent / "cache" / "FORMAT.md").read_text().partition("### What forces re-extraction")[2]
    rows = re.findall(r"^\| (.+?) \| .+ \|$", section.partition("\n## ")[0], re.MULTILINE)[1:]
    assert len(rows) == len(TABLE)
    for row, (beginning, name) in zip(rows, TABLE.items(), strict=True):
        assert row.startswith(beginning)
        file, _, test = name.rpartition("::")
        assert f"\ndef {test}(" in (TESTS / (file or "test_fingerprint.py")).read_text()
    own = re.findall(r"^def (test_row_\w+)\(", Path(__file__).read_text(), re.MULTILINE)
    assert set(own) - set(TABLE.values()) == {"test_row_a_moved_cache_is_the_same_cache"}  # of provenance's row


def test_row_changed_pixels_are_not_noticed(path: Path) -> None:
    """Labels know names, order and size alone; footage of one's own is another matter (test_video_files.py)."""
    assert open_writer(path, labels_of({1: 5, 2: 3})).pending(["1", "2"]) == []
    shutil.rmtree(path / "videos" / "2")  # as the table tells
    assert open_writer(path, labels_of({1: 5, 2: 3})).pending(["1", "2"]) == ["2"]


@pytest.mark.parametrize("field", sorted(OTHER_VALUES.keys() - {"codec", "format_version"}))
def test_row_changed_features_need_another_cache(path: Path, field: str) -> None:
    before = (path / "zarr.json").read_bytes()
    with pytest.raises(FingerprintMismatch, match=r"differ in[\s\S]*hint: extract into another path"):
        open_writer(path, fingerprint=replace(FINGERPRINT, **{field: OTHER_VALUES[field]}))
    assert (path / "zarr.json").read_bytes() == before
    assert FeatureCache.open(path).video_names() == ["1", "2"]


def test_row_added_videos_are_the_only_ones_extracted(path: Path) -> None:
    writer = open_writer(path, labels_of({1: 5, 2: 3, 9: 4}))
    assert writer.pending(["1", "2", "9"]) == ["9"]
    write_video(writer, "9", 4)
    assert FeatureCache.open(path).video_names() == ["1", "2", "9"]


def test_row_removed_videos_stay_unused(path: Path) -> None:
    writer = open_writer(path, labels_of({1: 5}))
    assert writer.pending(["1"]) == []
    assert FeatureCache.open(path).video_names() == ["1", "2"]


def test_row_changed_objects_and_categories_only_replace_the_label_file(path: Path) -> None:
    labels = json.loads(labels_of({1: 5, 2: 3}))
    labels["categories"] = [{"id": 1, "name": "zebra"}]
    labels["annotations"] = [{"id": 1, "video_id": 1, "category_id": 1}]
    writer = open_writer(path, json.dumps(labels).encode())
    assert writer.pending(["1", "2"]) == []
    assert json.loads(FeatureCache.open(path).labels_json()) == labels


def test_row_no_label_file_keeps_the_old_one(path: Path) -> None:
    open_writer(path, None)
    assert FeatureCache.open(path).labels_json() == labels_of({1: 5, 2: 3})


@pytest.mark.parametrize("labels", [labels_of({1: 6, 2: 3}), labels_of({1: 5, 2: 3}, prefix="other/")])
def test_row_other_frames_under_a_known_name_are_refused(path: Path, labels: bytes) -> None:
    with pytest.raises(FingerprintMismatch, match=r"video '1': the label file lists other frames[\s\S]*delete"):
        open_writer(path, labels)
    assert FeatureCache.open(path).labels_json() == labels_of({1: 5, 2: 3})


def test_row_added_views_are_extracted_beside(path: Path) -> None:
    names = [video_group_name(video_id, view) for video_id in (1, 2) for view in (View(), View(flip=True))]
    assert open_writer(path).pending(names) == ["1@flip", "2@flip"]


def test_row_a_changed_view_is_another_view() -> None:
    names = {View(short_edge=edge, flip=flip).name for edge in (None, 320, 352) for flip in (False, True)}
    assert len(names) == 6


def test_row_provenance_never_matters(path: Path) -> None:
    elsewhere = Provenance(date="1999", host="moon", command="", libraries={"torch": "0.1"}, paths={"w": "/x"})
    writer = CacheWriter.open(
        path,
        fingerprint=FINGERPRINT,
        heads=random_heads(),
        codec=Float16(),
        labels_json=None,
        provenance=elsewhere,
    )
    assert writer.pending(["1", "2", "3"]) == ["3"]
    write_video(writer, "3", 2)
    assert FeatureCache.open(path).root.sessions[-1]["host"] == "moon"


def test_row_a_moved_cache_is_the_same_cache(path: Path) -> None:
    moved = path.rename(path.with_name("moved"))
    assert open_writer(moved).pending(["1", "2"]) == []
    assert FeatureCache.open(moved).video("1").frame_queries().shape[0] == 5


# What identifies content


def test_sources_differ_in_names_order_and_size() -> None:
    digests = {
        source_digest(names, *size) for names in (["a", "b"], ["b", "a"], ["ab"], ["a"]) for size in ((1, 2), (2, 1))
    }
    assert len(digests) == 8


def test_file_digests(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"abc")
    # The digest of "abc" in FIPS 180-2, appendix B.1.
    assert sha256_file(tmp_path / "w") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("labels", [b"{", b"[]", b"{}", b'{"videos": [{"id": 1}]}', b'{"videos": 3}'])
def test_unusable_label_files_are_refused_before_any_writing(tmp_path: Path, labels: bytes) -> None:
    with pytest.raises(AnnotationError, match="YTVIS"):
        open_writer(tmp_path / "features", labels)
    assert not (tmp_path / "features").exists()


def test_provenance_names_the_libraries() -> None:
    gathered = Provenance.gather({"weights": "/w"})
    assert {"python", "numpy", "zarr"} <= gathered.libraries.keys()
    assert gathered.paths == {"weights": "/w"}
