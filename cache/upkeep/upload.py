"""Into an object store: whole caches, or an extraction video by video, through a local folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

from cache.codecs import Codec
from cache.codecs.rate_distortion import Calibration
from cache.errors import CacheError
from cache.fingerprint import Fingerprint, Provenance
from cache.heads import DetectorHeads
from cache.layout import ANNOTATIONS, CODEC, DETECTOR, METADATA, VIDEOS, VideoAttributes
from cache.progress import with_progress
from cache.reader import FeatureCache
from cache.sink import VideoSink
from cache.storage.remote import REQUESTS, RemoteStore, remote_url
from cache.storage.stores import FolderStore
from cache.upkeep.staging import fetch_all_but_videos, staged_folder
from cache.writer import CacheWriter, check_continuation, video_sources

LOCAL_VIDEOS = 3
"""At most so many lie in the local folder of an upload that keeps none: one written, one uploaded, one to be freed."""


class RemoteWriter(CacheWriter):
    """Writes into a local folder and takes every committed video from there to an object store, in the background.

    One video is uploaded while the next is written. Without `keep`, uploaded videos leave the local folder.
    """

    def __init__(self, local: CacheWriter, target: RemoteStore, there: set[str], *, keep: bool) -> None:
        super().__init__(local.path, local.fingerprint, local.codec, local.sources, local.provenance)
        self._target, self._there, self._keep = target, there, keep
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._upload: Future[None] | None = None

    def pending(self, names: Iterable[str]) -> list[str]:
        """See CacheWriter: neither there nor here."""
        return [name for name in super().pending(names) if name not in self._there]

    @contextmanager
    def video(self, name: str, attributes: VideoAttributes) -> Iterator[VideoSink]:
        """See CacheWriter. Also raises CacheError where the upload of an earlier video failed."""
        with super().video(name, attributes) as sink:
            yield sink
        self._begin_upload(name)

    def upload(self, names: Iterable[str]) -> None:
        """Take videos there that an interrupted extraction has left here."""
        for name in names:
            self._begin_upload(name)

    def finish(self) -> None:
        """Wait for the last video; labels, records and the session's provenance follow it."""
        self._await_upload()
        _put_all_but_videos(self._target, self.path)

    def close(self) -> None:
        """Wait for a running upload, whatever becomes of it."""
        self._pool.shutdown()

    def total_bytes(self) -> int:
        """See CacheWriter: of all objects."""
        return sum(self._target.listing().values())

    def _begin_upload(self, name: str) -> None:
        self._await_upload()
        self._upload = self._pool.submit(self._put, name)

    def _await_upload(self) -> None:
        if self._upload is not None:
            self._upload.result()

    def _put(self, name: str) -> None:
        self._target.put(METADATA, self.path / METADATA)  # The provenance tells who wrote it, also if we die now.
        _put_video(self._target, self.path, name)
        self._there.add(name)
        if not self._keep:
            rmtree(self.path / VIDEOS / name)


@contextmanager
def opened_writer(
    path: Path,
    stage_to: str | None,
    *,
    fingerprint: Fingerprint,
    heads: DetectorHeads,
    codec: Codec,
    labels_json: bytes,
    provenance: Provenance | None = None,
    calibration: Calibration | None = None,
) -> Iterator[CacheWriter]:
    """A writer of the cache at `path`, see CacheWriter.open; what it wrote is there when the block is left.

    For an address it writes to a copy below `stage_to`, which is kept, or else to a temporary folder, and uploads
    video by video. Also raises CacheError where the object store refuses.
    """
    address = remote_url(path)
    with ExitStack() as cleanup:
        folder, target, there = path, None, set[str]()
        if address is not None:
            temporary = "" if stage_to else cleanup.enter_context(TemporaryDirectory(prefix="vita-cache-"))
            folder = staged_folder(path, stage_to) if stage_to else Path(temporary)
            target = RemoteStore(url=address)
            there = _continued(target, folder, fingerprint, labels_json)
        writer = CacheWriter.open(
            folder,
            fingerprint=fingerprint,
            heads=heads,
            codec=codec,
            labels_json=labels_json,
            provenance=provenance,
            calibration=calibration,
        )
        if target is None:
            yield writer
            return
        remote = RemoteWriter(writer, target, there, keep=stage_to is not None)
        cleanup.callback(remote.close)
        _put_all_but_videos(target, folder)
        remote.upload(name for name in FeatureCache.open(folder).video_names() if name not in there)
        yield remote
        remote.finish()


def _continued(target: RemoteStore, folder: Path, fingerprint: Fingerprint, labels_json: bytes) -> set[str]:
    """Names of the videos that are there already; the folder is made ready to continue that cache."""
    if target.attributes("") is None:
        return set()
    there = check_continuation(target, fingerprint, video_sources(labels_json))
    if not (folder / METADATA).exists():
        folder.mkdir(parents=True, exist_ok=True)
        fetch_all_but_videos(target, folder)
    return there


def upload(folder: Path, address: str) -> None:
    """Copy the complete videos and all else of the cache in `folder` to an address.

    Videos that are complete there are not copied again. Raises FingerprintMismatch where the address holds
    other features.
    """
    feature_cache = FeatureCache.open(folder)
    if not isinstance(feature_cache.store, FolderStore):
        raise CacheError("only a cache in a folder can be uploaded", where=folder)
    target = RemoteStore(url=address)
    there = set[str]()
    if target.attributes("") is not None:
        labels = feature_cache.store.read_file(ANNOTATIONS)
        sources = {} if labels is None else video_sources(labels)
        there = check_continuation(target, feature_cache.fingerprint, sources)
    _put_all_but_videos(target, folder)
    names = [name for name in feature_cache.video_names() if name not in there]
    for name in with_progress(names, f"upload to {address}", unit="video"):
        _put_video(target, folder, name)


def _put_all_but_videos(target: RemoteStore, folder: Path) -> None:
    """Heads, codec, labels and what else lies beside the root, which comes last."""
    beside = [file for file in folder.iterdir() if file.name != METADATA and not file.name.startswith(".")]
    groups = [file for group in (DETECTOR, CODEC) for file in (folder / group).rglob("*")]
    _put_all(target, folder, [*groups, folder / VIDEOS / METADATA, *beside])
    target.put(METADATA, folder / METADATA)


def _put_video(target: RemoteStore, folder: Path, name: str) -> None:
    """All of a video's files, at a time, the commit marker last."""
    group = folder / VIDEOS / name
    _put_all(target, folder, [file for file in group.rglob("*") if file != group / METADATA])
    target.put(f"{VIDEOS}/{name}/{METADATA}", group / METADATA)


def _put_all(target: RemoteStore, folder: Path, entries: list[Path]) -> None:
    with ThreadPoolExecutor(max_workers=REQUESTS) as pool:
        files = [entry for entry in entries if entry.is_file()]
        list(pool.map(lambda file: target.put(str(file.relative_to(folder)), file), files))
