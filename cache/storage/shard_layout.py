"""The one layout of our arrays on disk (FORMAT.md, Arrays): what a Zarr v3 shard looks like, byte by byte.

A shard's file holds chunks of one frame, each followed by its CRC-32C, then the index: for every frame the
offset and size of its chunk, and a CRC-32C over all of it. All numbers are little-endian.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from fastcrc import crc32
from numpy.typing import NDArray

from cache.layout import fill_value
from cache.storage.compression import ZSTD_METADATA

DTYPES = {"float16": "<f2", "float32": "<f4", "int8": "|i1", "uint8": "|u1", "int16": "<i2"}
CRC_BYTES = 4
ENTRY_BYTES = 16
_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
ABSENT = 2**64 - 1
"""Offset and size of a chunk that was never written."""

crc32c = crc32.iscsi
"""Checksum of a buffer, optionally continued from the checksum of what came before it."""


def joint_checksum(frame_checksum: int, before: int) -> int:
    """The checksum of a field up to and with a frame: over the CRC-32C of every frame's elements."""
    return crc32c(frame_checksum.to_bytes(CRC_BYTES, "little"), before)


def content_checksum(frames: NDArray[Any], before: int = 0) -> int:
    """The checksum of a field up to and with these frames."""
    for frame in frames:
        before = joint_checksum(crc32c(frame.reshape(-1).view(np.uint8).data), before)
    return before


def index_bytes(frames_per_shard: int) -> int:
    """Size of a shard's index with its checksum."""
    return ENTRY_BYTES * frames_per_shard + CRC_BYTES


def encode_index(entries: list[tuple[int, int]], frames_per_shard: int) -> bytes:
    """The index of a shard whose first frames have these (offset, size) and whose others are absent."""
    table = np.full((frames_per_shard, 2), ABSENT, "<u8")
    table[: len(entries)] = entries
    content = table.tobytes()
    return content + crc32c(content).to_bytes(CRC_BYTES, "little")


def decode_index(content: bytes | bytearray) -> list[tuple[int, int]] | None:
    """(offset, size) of every frame of a shard; None where the checksum fails."""
    table = memoryview(content)[:-CRC_BYTES]
    if crc32c(table) != int.from_bytes(content[-CRC_BYTES:], "little"):
        return None
    numbers: NDArray[np.uint64] = np.frombuffer(table, "<u8")
    return list(zip(numbers[::2].tolist(), numbers[1::2].tolist(), strict=True))


def shard_name(shard: int, num_axes: int) -> str:
    """File name of a shard: its chunk key."""
    return ".".join(["c", str(shard), *["0"] * (num_axes - 1)])


def prescribed_metadata(
    shape: tuple[int, ...], dtype: np.dtype[Any], frames_per_shard: int, codecs: Any
) -> dict[str, Any]:
    """The entries of zarr.json that the fast reader relies on; `codecs` is what the array itself states."""
    stated = _inner(codecs)
    # The byte order of one-byte elements may be left out.
    bytes_codec = {"name": "bytes"} if dtype.itemsize == 1 and {"name": "bytes"} in stated else _LITTLE
    compression = [ZSTD_METADATA] if is_compressed(codecs) else []
    sharding = {
        "chunk_shape": [1, *shape[1:]],
        "codecs": [bytes_codec, *compression, {"name": "crc32c"}],
        "index_codecs": [_LITTLE, {"name": "crc32c"}],
        "index_location": "end",
    }
    chunk_shape = [frames_per_shard, *shape[1:]]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "storage_transformers": [],
    }


def array_metadata(
    shape: tuple[int, ...], dtype: np.dtype[Any], frames_per_shard: int, axes: tuple[str, ...], *, compressed: bool
) -> dict[str, Any]:
    """The whole zarr.json of an array of the prescribed layout."""
    bytes_codec = {"name": "bytes"} if dtype.itemsize == 1 else _LITTLE
    stated = [{"configuration": {"codecs": [bytes_codec, *([ZSTD_METADATA] if compressed else [])]}}]
    return {
        "shape": list(shape),
        "data_type": dtype.name,
        "fill_value": "NaN" if dtype.kind == "f" else fill_value(dtype),
        "attributes": {},
        "dimension_names": list(axes),
        **prescribed_metadata(shape, dtype, frames_per_shard, stated),
    }


def is_compressed(codecs: Any) -> bool:
    """Whether an array's chunks are compressed as ours are (compression.py)."""
    return ZSTD_METADATA in _inner(codecs)


def _inner(codecs: Any) -> list[Any]:
    inner = codecs[0].get("configuration", {}).get("codecs", [])
    return inner if isinstance(inner, list) else []
