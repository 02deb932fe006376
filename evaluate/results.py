"""Predicted tracks in the submission format of the benchmarks: results.json, and a zip with it inside.

One entry per predicted track: video_id, category_id, score, and one compressed RLE or null per frame.
"""

from __future__ import annotations

import json
import lzma
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cache.errors import AnnotationError
from cache.labels.annotations import category_of, segmentations_of, video_of
from cache.labels.json_entries import Entry, entries, parse_json, read_json, show
from cache.labels.masks import Rle
from cache.labels.tracks import Labels

RESULTS_NAME, RESULTS_ZIP = "results.json", "results.zip"
_MAX_UNZIPPED_BYTES = 4 * 2**30  # Run lengths of a whole benchmark take some 100 MB: more is a zip bomb.
# What a damaged, encrypted or exotic archive raises.
_UNZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError)
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # The same predictions give the same bytes.


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackPrediction:
    """A predicted object of one video: a mask (or None) per frame, a category and a score."""

    video_id: int
    category_id: int
    score: float
    segmentations: Sequence[Rle | None]

    def to_json(self) -> dict[str, object]:
        """The entry of the submission format."""
        return {
            "video_id": self.video_id,
            "category_id": self.category_id,
            "score": self.score,
            "segmentations": [None if rle is None else rle.to_json() for rle in self.segmentations],
        }


def write_results(path: Path, predictions: Iterable[TrackPrediction]) -> Path:
    """Write `path` (results.json) and beside it the zip to submit, whose path is returned.

    Each appears under its name only when it is whole. One track at a time is in memory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft, zip_path = path.with_name(path.name + ".tmp"), path.with_suffix(".zip")
    with draft.open("w", encoding="ascii") as file:
        file.write("[")
        for index, prediction in enumerate(predictions):
            file.write((", " if index else "") + json.dumps(prediction.to_json()))
        file.write("]")
    draft.replace(path)
    member = zipfile.ZipInfo(RESULTS_NAME, date_time=_ZIP_TIME)
    member.compress_type, member.file_size = zipfile.ZIP_DEFLATED, path.stat().st_size
    with zipfile.ZipFile(draft, "w") as archive, path.open("rb") as content, archive.open(member, "w") as packed:
        shutil.copyfileobj(content, packed)
    draft.replace(zip_path)
    return zip_path


def load_results(path: Path, labels: Labels) -> list[TrackPrediction]:
    """Read results.json, or the zip that holds it, and check every entry against the labels.

    AnnotationError for a video or category that the labels do not know, a number of masks that is not the
    number of frames, a score that is not finite, a mask of another size than the video.
    """
    data = _read_zipped(path) if zipfile.is_zipfile(path) else read_json(path)
    if not isinstance(data, list):
        raise AnnotationError("not a result file", where=path, expected="a list of tracks", got=show(data))
    return [_prediction(entry, labels) for entry in entries(data, str(path))]


def _prediction(entry: Entry, labels: Labels) -> TrackPrediction:
    video = video_of(entry, labels)
    located = Entry(fields=entry.fields, where=f"{entry.where} of video {video.id} ({video.name})")
    return TrackPrediction(
        video_id=video.id,
        category_id=category_of(located, labels),
        score=located.number("score"),
        segmentations=segmentations_of(located, video),
    )


def _read_zipped(path: Path) -> object:
    where = f"{path}/{RESULTS_NAME}"
    try:
        with zipfile.ZipFile(path) as archive:
            if RESULTS_NAME not in archive.namelist():
                found = ", ".join(archive.namelist()[:5]) or "an empty archive"
                raise AnnotationError(f"no {RESULTS_NAME} in the archive", where=path, got=found)
            size = archive.getinfo(RESULTS_NAME).file_size
            if size > _MAX_UNZIPPED_BYTES:
                limit = f"at most {_MAX_UNZIPPED_BYTES} bytes"
                raise AnnotationError("too large when unpacked", where=where, expected=limit, got=f"{size} bytes")
            data = archive.read(RESULTS_NAME)
    except _UNZIP_ERRORS as error:
        raise AnnotationError("the archive cannot be read", where=path, got=str(error)) from error
    return parse_json(data, where)
