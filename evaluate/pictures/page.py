"""Pages from templates: self-contained HTML, names escaped, the style shared."""

from __future__ import annotations

from pathlib import Path

import jinja2

from evaluate.score import percent

_FOLDER = Path(__file__).parents[1]  # evaluate/
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.globals["percent"] = percent


def render(template: str, **values: object) -> str:
    """Fill a template of evaluate/, such as `compare/comparison.html.j2`; a missing value is an error."""
    return _ENVIRONMENT.get_template(template).render(**values)


def read_text(name: str) -> str:
    """A file of evaluate/ as it is, such as a script that goes into a page."""
    return (_FOLDER / name).read_text(encoding="utf-8")
