"""Writing into an object store, video by video, through a local folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

from cache.codecs import Codec
from cache.codecs.rate_distortion import Calibration
from cache.fingerprint import Fingerprint, Provenance
from cache.heads import DetectorHeads
from cache.layout import METADATA, VIDEOS, VideoAttributes
from cache.reader import FeatureCache
from cache.sink import VideoSink
from cache.storage.connection import remote_url
from cache.storage.remote import RemoteStore
from cache.upkeep.staging import fetch_all_but_videos, staged_folder
from cache.upkeep.upload import put_all_but_videos, put_video
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
        put_all_but_videos(self._target, self.path)

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
        put_video(self._target, self.path, name)
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
        put_all_but_videos(target, folder)
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
