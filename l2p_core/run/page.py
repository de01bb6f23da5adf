"""Self-contained HTML pages: one style for light and dark, pictures inside the file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from PIL import Image

from ..dataset.images import opened
from ..dataset.pictures import png

WIDEST = 1536
"""Pixels that pictures are shrunk to."""

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --shade: #f4f4f4; --line: #ddd; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #1b1b1d; --shade: #29292c; --line: #444; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem 1.2rem .15rem 0; text-align: left; }
.lined tr { border-bottom: 1px solid var(--line); } .scroll { overflow-x: auto; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } svg { max-width: 100%; height: auto; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.pairs img { width: 50%; vertical-align: top; } .pairs .three img { width: 33.3%; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; font-size: 13px; }
figure { margin: 0 0 1.5rem; } img { max-width: 100%; }
pre { background: var(--shade); padding: .8rem; overflow-x: auto; font-size: 13px; }
"""


def page(title: str, parts: Iterable[str]) -> bytes:
    """The file of a page that needs nothing else; `parts` are HTML."""
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<title>{text(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'.encode(
        errors="backslashreplace"  # half characters: of file names on Linux, and of what models and files say
    )


def text(plain: str) -> str:
    """Text escaped for a page."""
    return html.escape(plain)


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    return "<table>" + "".join(f"<tr><td>{text(a)}</td><td>{text(b)}</td></tr>" for a, b in rows) + "</table>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """A table with lines; `numbers` are the positions of columns of numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        marked = (
            f"<{tag}{' class=number' if i in numbers else ''}>{text(cell)}</{tag}>" for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(marked)}</tr>"

    body = "".join([line(header, "th"), *(line(row, "td") for row in rows)])
    return f'<div class="scroll"><table class="lined">{body}</table></div>'


def spread(total: int, most: int) -> list[int]:
    """At most so many of `total` indices, evenly spread, with the first and the last among them."""
    count = min(most, total)
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


def png_url(path: Path) -> str:
    """A PNG file inside the page; large ones are reduced and stored as JPEG, or a page would have hundreds of
    megabytes."""
    with opened(path, ("PNG",)) as image:
        if image.width <= WIDEST:
            return _url("png", path.read_bytes())
        return jpeg_url(image, WIDEST)


def picture_url(image: Image.Image, exact: bool) -> str:
    """A picture inside the page as it is: as PNG if its pixels matter, else as JPEG."""
    if not exact:
        return jpeg_url(image, max(image.size))
    return _url("png", png(image))


def jpeg_url(image: Image.Image, widest: int) -> str:
    """A picture inside the page, as JPEG of at most so many pixels across; the image itself may be shrunk."""
    if max(image.size) > widest:
        image.thumbnail((widest, 1 << 16))
    content = io.BytesIO()
    image.convert("RGB").save(content, format="JPEG", quality=88)
    return _url("jpeg", content.getvalue())


def _url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
