"""Typed access to entries of JSON files; what is missing or wrong becomes one AnnotationError."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cache.errors import AnnotationError

_LARGEST = sys.float_info.max


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One JSON object of a file, and where it stands, as in `train.json: annotations[3] (id 7)`."""

    fields: dict[str, object]
    where: str

    def fail(self, what: str, *, expected: object = None, got: object = None, hint: str | None = None) -> NoReturn:
        """Raise the AnnotationError of this entry."""
        raise AnnotationError(what, where=self.where, expected=expected, got=got, hint=hint)

    def field(self, name: str, expected: str) -> object:
        """The field as it is; AnnotationError where it is missing."""
        if name not in self.fields:
            present = ", ".join(sorted(self.fields)) or "none"
            self.fail(f"field {name!r} is missing", expected=expected, got=f"the fields {present}")
        return self.fields[name]

    def integer(self, name: str, *, minimum: int | None = None) -> int:
        """A field that must be an integer (booleans are not), `minimum` or more."""
        expected = "an integer" if minimum is None else f"an integer of {minimum} or more"
        value = self.field(name, expected)
        if type(value) is not int or (minimum is not None and value < minimum):
            self.fail(f"field {name!r} is wrong", expected=expected, got=show(value))
        return value

    def number(self, name: str) -> float:
        """A field that must be a finite number."""
        value = self.field(name, "a finite number")
        # The comparison is false for NaN and for infinities, and exact for integers of hundreds of digits.
        if isinstance(value, bool) or not (isinstance(value, int | float) and -_LARGEST <= value <= _LARGEST):
            self.fail(f"field {name!r} is wrong", expected="a finite number", got=show(value))
        return float(value)

    def text(self, name: str) -> str:
        """A field that must be a non-empty string."""
        value = self.field(name, "a non-empty string")
        if not isinstance(value, str) or not value:
            self.fail(f"field {name!r} is wrong", expected="a non-empty string", got=show(value))
        return value

    def items(self, name: str, *, length: int | None = None) -> list[object]:
        """A field that must be a list, of one item per frame where `length` is given."""
        expected = "a list" if length is None else f"a list of {length} items, one per frame"
        value = self.field(name, expected)
        if not isinstance(value, list):
            self.fail(f"field {name!r} is wrong", expected=expected, got=show(value))
        if length is not None and len(value) != length:
            self.fail(f"field {name!r} has the wrong length", expected=expected, got=f"{len(value)} items")
        return value


def entries(items: list[object], where: str) -> list[Entry]:
    """The objects of a list, each located by its index and, where it has one, its id."""
    located = []
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise AnnotationError(
                "an entry is not an object",
                where=f"{where}[{index}]",
                expected="a JSON object",
                got=show(item),
            )
        identity = f" (id {item['id']})" if "id" in item else ""
        located.append(Entry(fields=item, where=f"{where}[{index}]{identity}"))
    return located


def read_json(path: Path) -> object:
    """Parse a JSON file; AnnotationError with line and column where it is malformed."""
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise AnnotationError(
            "the file cannot be read",
            where=path,
            got=error.strerror,
            hint="Check the path and the permissions.",
        ) from error


def parse_json(data: bytes, where: str) -> object:
    """Parse JSON; AnnotationError with line and column where it is malformed."""
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        raise AnnotationError(
            f"malformed JSON: {error.msg}",
            where=f"{where}:{error.lineno}:{error.colno}",
            hint="The file is cut off or was edited by hand; fetch it again or mend that line.",
        ) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise AnnotationError("not a JSON file", where=where, got=str(error)) from error


def show(value: object) -> str:
    """A short form of any JSON value, for messages."""
    if value is None:
        return "null"
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} items"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
