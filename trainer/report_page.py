"""How a page is made of a template: one file, without any reference to another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from trainer.exhibits_cost import format_flops
from trainer.exhibits_reliability import told_cause
from trainer.formats import (
    format_bytes,
    format_duration,
    format_moment,
    format_number,
    format_score,
    format_share,
)


def render(template: str, context: Mapping[str, Any]) -> str:
    """The page's text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=format_number,
        duration=format_duration,
        size=format_bytes,
        moment=format_moment,
        score=format_score,
        share=format_share,
        flops=format_flops,
        cause=told_cause,
        broken=_broken,
    )
    return environment.get_template(template).render(context)


def _broken(name: str) -> Markup:
    """A setting's name that may go on in the next line behind a dot or an underline."""
    text = str(escape(name))
    return Markup(text.replace(".", ".<wbr>").replace("_", "_<wbr>"))  # noqa: S704
