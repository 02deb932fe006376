"""Errors that users meet. Each says what is wrong, where, what was expected, what was found, and what to do next."""

from __future__ import annotations

import re
from collections.abc import Iterable


def some(items: Iterable[object], shown: int = 5) -> str:
    """The first few of many names, for messages."""
    listed = [str(item) for item in items]
    return ", ".join(listed[:shown]) + (f", ... ({len(listed)} in all)" if len(listed) > shown else "")


def first_line(error: Exception) -> str:
    """What went wrong, without the page of internals that libraries add; the error's type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def shown(place: object) -> str:
    """A path or address, or words with some; a `Path` has lost one slash of `s3://bucket`."""
    return re.sub(r"\b(s3|gs|az|https?):/(?=[^/])", r"\1://", str(place))


class VitaCacheError(ValueError):
    """Base of every error caused by input (files, settings, weights), never by a bug.

    The command line prints it as one line plus a hint and exits with status 2.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        """Compose the message `where: what (expected ..., got ...). hint`."""
        text = f"{where}: {what}" if where is not None else what
        if expected is not None and got is not None:
            text += f" (expected {expected}, got {got})"
        elif expected is not None:
            text += f" (expected {expected})"
        elif got is not None:
            text += f" (got {got})"
        if hint is not None:
            text += f"\n  hint: {hint}"
        super().__init__(shown(text))
        self.what, self.where, self.hint = what, where, hint


class ConfigError(VitaCacheError):
    """A setting is unknown, of the wrong type or impossible."""


class AnnotationError(VitaCacheError):
    """A label file or a prediction file breaks its schema."""


class FrameError(VitaCacheError):
    """A frame is missing, unreadable or of the wrong size."""


class WeightsError(VitaCacheError):
    """A weight file is unreadable, unsafe, or does not fit the model."""


class CacheError(VitaCacheError):
    """Base of the errors of reading or writing a feature cache."""


class FormatVersionError(CacheError):
    """The cache was written by another version of the format."""


class FingerprintMismatch(CacheError):
    """Cache, settings and checkpoint do not belong together."""


class IncompleteVideo(CacheError):
    """A video has no commit marker: its extraction did not finish."""


class VideoBusy(CacheError):
    """Another process is writing the video."""


class FolderBusy(VitaCacheError):
    """Another process holds the folder."""


class FeatureError(CacheError):
    """Features of a video that cannot be stored: not finite, or beyond float16."""


class CorruptData(CacheError):
    """Stored bytes fail their checksum, are missing, or have the wrong shape."""


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""In messages of PyTorch's allocators."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is memory that was missing, of the machine or of the GPU."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)
