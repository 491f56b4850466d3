"""Templates of the report and the model card, beside the modules that fill them; strict about what is missing."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

__all__ = ["templates", "title"]


def title(column: str) -> str:
    """Column name as words: "age_band" -> "age band"."""
    return column.replace("_", " ")


def templates(*, escape: bool) -> Environment:
    """The templates of this folder, with `title` as a filter; a name that nobody gave is an error, not a blank.

    Args:
        escape: for HTML: values are text, never markup.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["title_of"] = title  # jinja's own `title` capitalises
    return environment
