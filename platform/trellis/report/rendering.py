"""Turn values into one HTML file. Jinja2 escapes every text that came from a user."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trellis import __version__

HERE = Path(__file__).parent


def render(template: str, context: Mapping[str, Any]) -> bytes:
    """Return a page as UTF-8. Half surrogates, which JSON can smuggle in, become question marks."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, lstrip_blocks=True
    )
    style = (HERE / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    text = environment.get_template(template).render(
        **context,
        style=Markup(style),
        style_hash=Markup(digest),
        version=__version__,
    )
    return text.encode("utf-8", errors="replace")


def write(target: Path, template: str, context: Mapping[str, Any]) -> Path:
    """Write a page in one step: a reader sees the old one or the new one, never half of it."""
    page = render(template, context)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    draft.write_bytes(page)
    draft.replace(target)
    return target
