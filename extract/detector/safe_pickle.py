"""Read `.pkl` weight files without running any code that they may carry.

The official model zoo pickles dictionaries of numpy arrays. A pickle is a program; this one may call nothing
but the few stand-ins below, which only collect what it says about arrays. No function of numpy or of anybody
else runs under its control: dtypes are looked up in a fixed table, array data is copied out of plain bytes.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

_DTYPES: Mapping[str, type[np.generic]] = {
    "f2": np.float16,
    "f4": np.float32,
    "f8": np.float64,
    "i1": np.int8,
    "i2": np.int16,
    "i4": np.int32,
    "i8": np.int64,
    "u1": np.uint8,
    "b1": np.bool_,
}


def load_plain_pickle(file: BinaryIO) -> object:
    """Unpickle dicts, lists, tuples, strings, numbers and numpy arrays of numbers; nothing else.

    Arrays come back as writable copies. Raises pickle.UnpicklingError for anything else the file asks for; a
    damaged file may raise any exception.
    """
    # latin1: files written by Python 2 hold their array data as text
    return _finish(_PlainUnpickler(file, encoding="latin1").load())


class _Dtype:
    """Stands in for numpy.dtype."""

    def __init__(self, code: str, *_flags: object) -> None:
        if code not in _DTYPES:
            raise pickle.UnpicklingError(f"array of type {code!r}, only {', '.join(_DTYPES)} are read")
        self.numpy = np.dtype(_DTYPES[code])

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.numpy = self.numpy.newbyteorder(">" if state[1] == ">" else "<")


class _Array:
    """Stands in for numpy.ndarray: remembers shape, type and bytes."""

    def __init__(self, *_arguments: object) -> None:
        self.array: NDArray[np.generic] | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes | str]) -> None:
        _version, shape, dtype, column_major, data = state
        self.array = _array(data, dtype, shape, "F" if column_major else "C").array


def _array(data: bytes | bytearray | str, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    raw = data.encode("latin1") if isinstance(data, str) else data
    flat = np.frombuffer(raw, dtype=dtype.numpy)
    wrapped = _Array()
    wrapped.array = flat.reshape(shape, order="F" if order == "F" else "C").astype(dtype.numpy.newbyteorder("="))
    return wrapped


def _scalar(dtype: _Dtype, data: bytes | str) -> _Array:
    return _array(data, dtype, (), "C")


def _latin1(text: str, encoding: str) -> bytes:
    """Stands in for _codecs.encode, by which old pickle protocols write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes written as {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Stands in for bytes(), by which protocol 2 writes the data of an empty array."""
    return b""


_ALLOWED: Mapping[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,
    ("__builtin__", "bytes"): _no_bytes,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    **{
        (f"numpy.{core}.multiarray", name): stand_in
        for core in ("core", "_core")
        for name, stand_in in (("_reconstruct", _Array), ("scalar", _scalar))
    },
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array for core in ("core", "_core")},
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., object]:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the file asks to call {module}.{name}")
        return _ALLOWED[module, name]


def _finish(value: object) -> object:
    """Replace the stand-ins inside dicts by their arrays; zoo files hold arrays nowhere else."""
    if isinstance(value, dict):
        return {key: _finish(item) for key, item in value.items()}
    return value.array if isinstance(value, _Array) else value
