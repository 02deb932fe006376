"""Caches in object stores (`s3://`, `gs://`, `az://`), read through obstore (the extra `remote`).

A clip is two requests a shard at most: its index, once, and the wanted frames, which obstore fetches in parallel. On
Azure the index takes two, since ranges from the end are unknown there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import CorruptData, first_line
from cache.layout import METADATA, VIDEOS, is_video_name, parse_group_attributes
from cache.storage.compression import decompress
from cache.storage.connection import in_words, lacks_bucket, object_store, reason, require_connecting_process
from cache.storage.contract import committed, is_record, require_finite
from cache.storage.shard_layout import ABSENT, CRC_BYTES, crc32c, decode_index, index_bytes, shard_name
from cache.storage.shards import ShardedFrames, checked_output

if TYPE_CHECKING:
    from obstore.store import ObjectStore

REQUESTS = 16
"""In parallel."""
RETRY_HINT = "if the object store is at fault, try again; else extract this video anew"


@dataclass(frozen=True, kw_only=True)
class RemoteStore:
    """A cache behind an address; every process connects for itself, when it first reads."""

    url: str

    def __getstate__(self) -> dict[str, Any]:
        """Without the connection: it does not survive the way into another process."""
        return {"url": self.url}

    @property
    def path(self) -> Path:
        """The address, as far as a path can hold it."""
        return Path(self.url)

    @property
    def objects(self) -> ObjectStore:
        """The connection. Raises CacheError in a forked process."""
        require_connecting_process(self.url)
        return self._objects

    @cached_property
    def _objects(self) -> ObjectStore:
        return object_store(self.url)

    def attributes(self, group: str) -> dict[str, Any] | None:
        """See Store."""
        name = f"{group}/{METADATA}".lstrip("/")
        content = self.get(name)
        return None if content is None else parse_group_attributes(content, f"{self.url}/{name}")

    def arrays(self, group: str) -> dict[str, NDArray[Any]]:
        """See Store."""
        import zarr
        from zarr.storage import ObjectStore as ZarrObjectStore

        found = {}
        for name in self.names(group):
            store = ZarrObjectStore(self.objects, read_only=True)
            try:
                values = np.asarray(zarr.open_array(store, path=f"{group}/{name}", mode="r")[...])
            except Exception as error:  # damaged metadata can fail anywhere in their reader
                raise CorruptData(f"unreadable: {first_line(error)}", where=f"{self.url}/{group}/{name}") from error
            found[name] = require_finite(values, f"{self.url}/{group}/{name}")
        return found

    def videos(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """See Store."""
        names = [name for name in self.names(VIDEOS) if is_video_name(name)]
        with ThreadPoolExecutor(max_workers=REQUESTS) as pool:
            yield from zip(names, pool.map(partial(committed, self), names), strict=True)

    def read_file(self, name: str) -> bytes | None:
        """See Store."""
        return self.get(name)

    def frames(self, video: str, field: str) -> RemoteFrames:
        """See Store. Raises CorruptData for arrays of another layout than FORMAT.md prescribes."""
        name = f"{VIDEOS}/{video}/{field}"
        try:
            layout = ShardedFrames.recognise(Path(name), json.loads(self.get(f"{name}/{METADATA}") or b"null"))
        except (ValueError, RecursionError):
            layout = None
        if layout is None:
            hint = "stage the cache locally (cache.stage_to), where any Zarr layout is read"
            raise CorruptData("missing, or not of the prescribed layout", where=f"{self.url}/{name}", hint=hint)
        return RemoteFrames(store=self, name=name, layout=layout)

    def size(self, video: str, field: str) -> int:
        """See Store."""
        return sum(self.listing(f"{VIDEOS}/{video}/{field}/").values())

    def listing(self, prefix: str | None = None) -> dict[str, int]:
        """Names and bytes of all objects, or of those below a prefix that ends in `/`."""
        return {entry["path"]: entry["size"] for entry in self._list(prefix)}

    def last_put(self, prefix: str) -> datetime | None:
        """When the newest object below a prefix was put, by the store's clock; None where there is none."""
        return max((entry["last_modified"] for entry in self._list(prefix)), default=None)

    def _list(self, prefix: str | None) -> Any:
        with in_words(f"{self.url}/{prefix or ''}", "cannot be listed"):
            import obstore

            return obstore.list(self.objects, prefix=prefix).collect()

    def files(self) -> list[str]:
        """See Store."""
        return sorted(entry["path"] for entry in self._entries("")["objects"] if is_record(entry["path"]))

    def put(self, name: str, file: Path) -> None:
        """Store a file's bytes. Raises CacheError where the store refuses them."""
        with in_words(f"{self.url}/{name}", "cannot be written"):
            import obstore

            obstore.put(self.objects, name, file)

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects, in bulk where the store can; some may be gone. Raises CacheError where the store refuses."""
        if not names:
            return
        with in_words(f"{self.url}/{names[0]}", "cannot be deleted"):
            import obstore

            try:
                obstore.delete(self.objects, list(names))
            except FileNotFoundError:  # So Google and Azure call one that is gone, and may leave those after it.
                for name in names:
                    with suppress(FileNotFoundError):
                        obstore.delete(self.objects, name)

    def delete_video(self, name: str) -> None:
        """Delete all of a video, the commit marker first: where it is stopped it leaves an unfinished video."""
        self.delete([f"{VIDEOS}/{name}/{METADATA}"])
        self.delete(list(self.listing(f"{VIDEOS}/{name}/")))

    def fetch(self, name: str, target: Path) -> None:
        """Copy an object's bytes to the file `target`. Raises CacheError where the store cannot be reached."""
        with target.open("wb") as file:
            for piece in self._pieces(name):
                file.write(piece)

    def _pieces(self, name: str) -> Iterator[bytes]:
        with in_words(f"{self.url}/{name}"):
            import obstore

            yield from map(bytes, obstore.get(self.objects, name).stream())

    def names(self, group: str) -> list[str]:
        """Names of the groups and arrays in a group, sorted."""
        prefixes = self._entries(f"{group}/")["common_prefixes"]
        return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in prefixes)

    def _entries(self, prefix: str) -> Any:
        with in_words(f"{self.url}/{prefix}", "cannot be listed"):
            import obstore

            return obstore.list_with_delimiter(self.objects, prefix=prefix or None)

    def get(self, name: str) -> bytes | None:
        """An object's bytes, None where there is none. Raises CacheError where there is no store, or none answers."""
        with in_words(f"{self.url}/{name}"):
            import obstore

            try:
                return bytes(obstore.get(self.objects, name).bytes())
            except FileNotFoundError as error:
                if lacks_bucket(error):
                    raise
                return None


@dataclass(frozen=True, kw_only=True)
class RemoteFrames:
    """A field of a remote video; see frames.FrameArray."""

    store: RemoteStore
    name: str
    layout: ShardedFrames
    _indexes: dict[int, list[tuple[int, int]]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, ...)."""
        return self.layout.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the elements."""
        return self.layout.dtype

    def read(self, frames: Sequence[int], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """See FrameArray."""
        out = checked_output(self.shape, self.dtype, frames, out)
        rows = out.reshape(len(frames), -1).view(np.uint8) if frames else out
        for shard in sorted({frame // self.layout.frames_per_shard for frame in frames}):
            wanted = [row for row, frame in enumerate(frames) if frame // self.layout.frames_per_shard == shard]
            chunks = self._chunks(shard, [frames[row] for row in wanted])
            for row, chunk in zip(wanted, chunks, strict=True):
                content = chunk[:-CRC_BYTES]
                if crc32c(content) != int.from_bytes(chunk[-CRC_BYTES:], "little"):
                    raise self._corrupt("checksum mismatch", frames[row])
                if not (decompress if self.layout.compressed else _copy)(content, rows[row].data):
                    raise self._corrupt("chunk does not hold a frame", frames[row])
        return out

    def _chunks(self, shard: int, frames: list[int]) -> list[bytes]:
        """The chunks of some frames of a shard, checksums included."""
        import obstore

        file = f"{self.name}/{shard_name(shard, len(self.shape))}"
        try:
            if shard not in self._indexes:
                self._indexes[shard] = self._index(file, frames[0])
            entries = [self._indexes[shard][frame % self.layout.frames_per_shard] for frame in frames]
            for frame, entry in zip(frames, entries, strict=True):
                if entry == (ABSENT, ABSENT):
                    raise self._corrupt("frame was never written", frame)
            starts, lengths = [entry[0] for entry in entries], [entry[1] for entry in entries]
            found = obstore.get_ranges(self.store.objects, file, starts=starts, lengths=lengths)
        except (obstore.exceptions.BaseError, OSError) as error:
            raise self._corrupt(f"shard cannot be read: {reason(error)}", frames[0]) from error
        return [bytes(chunk) for chunk in found]

    def _index(self, file: str, frame: int) -> list[tuple[int, int]]:
        size = index_bytes(self.layout.frames_per_shard)
        content = self._end(file, size)
        index = decode_index(content) if len(content) == size else None
        if index is None:
            raise self._corrupt("checksum mismatch in the shard's index", frame)
        return index

    def _end(self, file: str, size: int) -> bytes:
        """The last bytes of a shard."""
        import obstore

        try:
            return bytes(obstore.get(self.store.objects, file, options={"range": {"suffix": size}}).bytes())
        except obstore.exceptions.NotSupportedError:  # Azure
            start = max(obstore.head(self.store.objects, file)["size"] - size, 0)
            return bytes(obstore.get_range(self.store.objects, file, start=start, length=size))

    def _corrupt(self, what: str, frame: int) -> CorruptData:
        return CorruptData(what, where=f"{self.store.url}/{self.name}, frame {frame}", hint=RETRY_HINT)


def _copy(content: bytes, row: memoryview) -> bool:
    """Fill `row` with the content of a plain chunk; False where it has another length."""
    if len(content) == len(row):
        row[:] = content
    return len(content) == len(row)
