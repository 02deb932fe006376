"""Writing a cache: one folder per video, whole shards, the commit marker last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache.codecs import Codec, codec_identity
from cache.codecs.rate_distortion import CALIBRATION, Calibration, write_calibration
from cache.errors import AnnotationError, CacheError, FingerprintMismatch
from cache.fingerprint import Fingerprint, Provenance, source_digest
from cache.heads import DetectorHeads
from cache.layout import (
    ANNOTATIONS,
    CARD,
    CHECKSUMS,
    CODEC,
    DETECTOR,
    FORMAT_NAME,
    METADATA,
    VIDEOS,
    VideoAttributes,
    checked_name,
    group_metadata,
    sync_to_disk,
    write_file_atomically,
)
from cache.reader import FeatureCache, Root
from cache.sink import VideoSink
from cache.storage.contract import Store, committed
from cache.storage.folder import FolderStore
from cache.storage.locks import LOCKS, ROOT_LOCK, VideoLocks, locked, sweep_locks
from cache.storage.shard_writer import write_array


class CacheWriter:
    """Creates a cache or continues one. Several processes may write different videos of it at the same time."""

    def __init__(
        self,
        path: Path,
        fingerprint: Fingerprint,
        codec: Codec,
        sources: Mapping[str, str],
        provenance: Provenance,
    ) -> None:
        self.path, self.fingerprint, self.codec = path, fingerprint, codec
        self.sources, self.provenance, self._recorded = sources, provenance, False
        self._store, self._locks = FolderStore(path=path), VideoLocks(path)

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        fingerprint: Fingerprint,
        heads: DetectorHeads,
        codec: Codec,
        labels_json: bytes | None,
        provenance: Provenance | None = None,
        calibration: Calibration | None = None,
    ) -> CacheWriter:
        """Create the cache at `path`, or continue the one that is there, and store the labels' bytes in it.

        `labels_json`: the data set's label file, None to keep what is there. `provenance`: of this
        session, gathered here if not given. `calibration`: by which the codec was chosen.
        A continued cache keeps its heads and its codec (with the arrays
        fitted at first).

        Raises FingerprintMismatch where the cache there holds other features, or where the labels mean other
        frames by the name of a video already extracted; CacheError where `path` is something else.
        """
        path = Path(path)
        if codec_identity(codec) != fingerprint.codec:
            what = "codec differs from the fingerprint"
            raise CacheError(what, expected=fingerprint.codec, got=codec_identity(codec))
        sources = {} if labels_json is None else video_sources(labels_json)
        path.mkdir(parents=True, exist_ok=True)
        store = FolderStore(path=path)
        with locked(path):
            _sweep(path)
            if (path / METADATA).exists():
                check_continuation(store, fingerprint, sources)
                codec = FeatureCache.open(path).codec
            else:
                _create(store, fingerprint, heads, codec, calibration)
            if labels_json is not None and store.read_file(ANNOTATIONS) != labels_json:
                write_file_atomically(path / ANNOTATIONS, labels_json)
        return cls(path, fingerprint, codec, sources, provenance or Provenance.gather())

    def pending(self, names: Iterable[str]) -> list[str]:
        """Those of the video group names that are not complete in the cache, in the order given."""
        complete = {name for name, attributes in self._store.videos() if attributes}
        return [name for name in names if checked_name(name) not in complete]

    def claim(self, name: str) -> bool:
        """Lock a video before its frames are read, until it is written.

        Returns False where it is complete already. Raises VideoBusy where another process writes it.
        """
        self._locks.claim(checked_name(name))
        if committed(self._store, name):
            self._locks.release(name)
            return False
        return True

    @contextmanager
    def claims(self) -> Iterator[Callable[[str], bool]]:
        """As `claim`; at the end of the block, what was claimed through it and never written is given back.

        Threads may share the writer: each gives back only what is its own.
        """
        claimed: list[str] = []

        def claim(name: str) -> bool:
            if not self.claim(name):
                return False
            claimed.append(name)
            return True

        try:
            yield claim
        finally:
            self._locks.release_unwritten(claimed)

    @contextmanager
    def video(self, name: str, attributes: VideoAttributes) -> Iterator[VideoSink]:
        """Write one video: append frames to the sink; leaving the block without an error commits the video.

        An incomplete leftover of the same video is removed first. On an error nothing is committed.
        Raises CacheError where the video is complete already or the frames that arrived are not the number
        declared, VideoBusy where another process is writing it.
        """
        folder = self.path / VIDEOS / checked_name(name)
        if name.partition("@")[2] != attributes.view.name:
            raise CacheError("name and view differ", where=f"video {name!r}", expected=f"@{attributes.view.name}")
        with self._locks.held(name):
            folder.mkdir(exist_ok=True)
            self._remove_leftover(name)
            self.record_session()
            stored = {**attributes.to_json(), "source": self.sources.get(name.partition("@")[0])}
            write_file_atomically(folder / METADATA, group_metadata({"complete": False, **stored}))
            sink = VideoSink(folder, attributes, self.codec, self.fingerprint.num_layers)
            try:
                yield sink
                checksums = sink.finish()
            finally:
                sink.close()
            sync_tree(folder)
            stored[CHECKSUMS] = checksums
            write_file_atomically(folder / METADATA, group_metadata({"complete": True, **stored}))
            sync_to_disk(folder.parent)

    def discard(self, name: str) -> None:
        """Remove what an abandoned extraction left of a video. Raises as `video`."""
        folder = self.path / VIDEOS / checked_name(name)
        with self._locks.held(name):
            if folder.exists():
                self._remove_leftover(name)
                folder.rmdir()

    def _remove_leftover(self, name: str) -> None:
        """Empty the folder of an incomplete video."""
        folder = self.path / VIDEOS / name
        if committed(self._store, name):
            raise CacheError("the video is complete already", where=folder, hint="write only what `pending` names")
        for entry in folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def total_bytes(self) -> int:
        """Of all the cache's files; those that another process removes meanwhile do not count."""
        return sum(self._store.listing("").values())

    def record_session(self) -> None:
        """Add this process to the provenance, once, and only when it writes features."""
        if self._recorded:
            return
        with locked(self.path):
            if not self._recorded:  # By another thread, while this one waited.
                root = Root.read(self._store)
                _write_root(self.path, self.fingerprint, self.codec, [*root.sessions, asdict(self.provenance)])
            self._recorded = True


def video_sources(labels_json: bytes) -> dict[str, str]:
    """The digest of every video's frames in a YTVIS label file, by video id. Raises AnnotationError."""
    try:
        videos = json.loads(labels_json)["videos"]
        return {str(v["id"]): source_digest(v["file_names"], v["height"], v["width"]) for v in videos}
    except (ValueError, KeyError, TypeError) as error:
        what = f"the label file is not YTVIS JSON: {error!r}"
        raise AnnotationError(what, hint="each of `videos` needs id, file_names, height, width") from error


def check_continuation(
    store: Store, fingerprint: Fingerprint, sources: Mapping[str, str], *, replaced: Container[str] = ()
) -> set[str]:
    """Names of the complete videos of a cache that features of this fingerprint and these labels may join.

    `replaced`: videos that may show other frames, since they will be replaced. Raises FingerprintMismatch where the
    features may not join.
    """
    hint = "extract into another path, set the old values again, or delete this cache"
    Root.read(store).fingerprint.require(fingerprint, where=store.path, hint=hint)
    complete = {name: attributes for name, attributes in store.videos() if attributes}
    for name, attributes in complete.items():
        source = attributes.get("source")
        wanted = sources.get(name.partition("@")[0], source)
        if source is not None and source != wanted and name not in replaced:
            raise FingerprintMismatch(
                "the label file lists other frames (names, order, size) than were extracted under this name",
                where=f"{store.path}: video {name!r}",
                hint=f"another data set needs another path; for a replaced video delete {VIDEOS}/{name}",
            )
    return set(complete)


def _create(
    store: FolderStore, fingerprint: Fingerprint, heads: DetectorHeads, codec: Codec, calibration: Calibration | None
) -> None:
    """Write all but the videos. The root's zarr.json comes last: without it there is no cache yet."""
    path = store.path
    own = {DETECTOR, CODEC, VIDEOS, ANNOTATIONS, LOCKS, ROOT_LOCK, CARD, CALIBRATION}
    names = [entry.name for entry in path.iterdir()]
    foreign = [name for name in names if name not in own and not name.endswith(".tmp")]
    if foreign:
        what = f"the folder is no cache and holds other things, such as {foreign[0]!r}"
        raise CacheError(what, where=path, hint="choose a new folder")
    if any(attributes for _, attributes in store.videos()):
        what = "the folder holds videos but no root metadata, so what they were made with is unknown"
        raise CacheError(what, where=path / METADATA, hint="restore the file, or choose a new folder")
    for group, arrays in ((DETECTOR, heads.arrays), (CODEC, codec.arrays), (VIDEOS, {})):
        attributes = {"category_names": list(heads.category_names)} if group == DETECTOR else {}
        (path / group).mkdir(exist_ok=True)
        for name, array in arrays.items():
            write_array(path / group / name, array)
        write_file_atomically(path / group / METADATA, group_metadata(attributes))
        sync_tree(path / group)
    if calibration is not None:
        write_calibration(path, calibration)
    _write_root(path, fingerprint, codec, [])


def _write_root(path: Path, fingerprint: Fingerprint, codec: Codec, sessions: list[dict[str, Any]]) -> None:
    attributes = {
        "format": FORMAT_NAME,
        "format_version": fingerprint.format_version,
        "fingerprint": fingerprint.to_json(),
        "fingerprint_sha256": fingerprint.digest(),
        "codec": {"name": codec.name, "parameters": dict(codec.parameters)},
        "provenance": sessions,
    }
    write_file_atomically(path / METADATA, group_metadata(attributes))


def _sweep(path: Path) -> None:
    """Remove what killed processes have left beside the root; the caller holds the cache's lock."""
    for file in path.glob(".*.tmp"):
        file.unlink(missing_ok=True)
    sweep_locks(path)


def sync_tree(folder: Path) -> None:
    """Bring all files and folders below `folder` to disk."""
    # At the same time, so that the file system can put them into one journal commit: several times faster.
    with ThreadPoolExecutor(max_workers=16) as pool:
        list(pool.map(sync_to_disk, [folder, *folder.rglob("*")]))
