"""A contact sheet: one HTML file with embedded thumbnails that needs no script, server or network."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from string import Template
from urllib.parse import quote

from clipadapt.errors import ClipadaptError, DataError
from clipadapt.files import written_aside
from clipadapt.search.images import named_image

_SIDE = 320  # longest side of a small image, pixels
_TEMPLATE = Path(__file__).with_name("sheet.html")


@dataclass(frozen=True)
class Card:
    """One image: its name (a path, where it is a file), the text below it, and whether it is framed."""

    name: str
    lines: Sequence[str] = ()
    marked: bool = False


@dataclass(frozen=True)
class Section:
    """Some images under a heading; an empty heading gives none."""

    cards: Sequence[Card]
    heading: str = ""
    note: str = ""


def write_sheet(file: str | Path, title: str, sections: Sequence[Section], note: str = "") -> Path:
    """Write a contact sheet; each image links to its file, by a path relative to the sheet's.

    An image that cannot be read is shown as the reason why.
    """
    file = Path(file)
    if not file.parent.is_dir():
        raise DataError(f"{file} cannot be written: there is no folder {file.parent}.")
    names = list(dict.fromkeys(card.name for section in sections for card in section.cards))
    with ThreadPoolExecutor() as pool:
        images = dict(zip(names, pool.map(_image, names), strict=True))
    body = "\n".join(_section(section, images, file) for section in sections)
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title), note=escape(note), sections=body
    )
    with written_aside(file) as aside:
        aside.write_text(page, encoding="utf-8", errors="replace")  # names need not be text
    return file


def _section(section: Section, images: dict[str, str], file: Path) -> str:
    heading = f"<h2>{escape(section.heading)}</h2>\n" if section.heading else ""
    note = f"<p>{escape(section.note)}</p>\n" if section.note else ""
    cards = "\n".join(_card(card, images[card.name], file) for card in section.cards)
    return f"<section>\n{heading}{note}<ol>\n{cards}\n</ol>\n</section>"


def _card(card: Card, image: str, file: Path) -> str:
    folder, name = os.path.split(card.name)
    lines = "".join(f"<span>{escape(line)}</span>" for line in [*card.lines, folder] if line)
    target = _link(card.name, file)
    shown = f'<a class="image" href="{escape(target)}">{image}</a>' if target else f'<div class="image">{image}</div>'
    frame = ' class="marked"' if card.marked else ""
    return f"<li{frame}><figure>{shown}<figcaption><b>{escape(name)}</b>{lines}</figcaption></figure></li>"


def _link(name: str, file: Path) -> str | None:
    """Where the image is, as seen from the sheet; None if it is not a separate file."""
    if name.startswith(("https://", "http://")):
        return quote(name, safe=":/?#[]@!$&'()*+,;=%~")
    if not os.path.isfile(name):
        return None
    try:
        path = os.path.relpath(os.path.abspath(name), os.path.abspath(file.parent))
    except ValueError:  # on another drive
        return Path(name).absolute().as_uri()
    return "./" + quote(os.fsencode(path.replace(os.sep, "/")))


def _image(name: str) -> str:
    """An image as an element whose source is within it."""
    try:
        image = named_image(name).open()
    except ClipadaptError as error:
        return f'<span class="missing">{escape(str(error))}</span>'
    image.thumbnail((_SIDE, _SIDE))
    data = BytesIO()
    image.save(data, "JPEG", quality=80)
    source = base64.b64encode(data.getvalue()).decode("ascii")
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img src="data:image/jpeg;base64,{source}" alt="{escape(os.path.basename(name))}" {size} loading="lazy">'
