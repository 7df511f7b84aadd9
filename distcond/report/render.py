"""From what was found to HTML: every text is escaped, and what cannot be seen is made visible; nothing but our script runs."""

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from distcond.report.svg import plain

FOLDER = Path(__file__).parent / "page"


def render(**found: Any) -> str:
    """The page. A policy in it allows our style and script, by their hashes, and nothing from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        finalize=lambda value: plain(value) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    style, script = (Markup((FOLDER / name).read_text(encoding="utf-8")) for name in ("style.css", "script.js"))
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    return environment.get_template("page.html.j2").render(
        style=style, script=script, policy=Markup(f"{policy}; form-action 'none'"), **found
    )


def _hash(text: str) -> str:
    """As a content security policy names an inline script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
