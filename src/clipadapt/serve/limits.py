"""What the server takes, and how much of it: settings, images that may be opened, API keys."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path

from PIL import Image

from clipadapt.data.items import decode
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.renamed import old_names

# Formats whose decoders are maintained against hostile files; others that Pillow knows start programs or are obscure.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_SHORTEST_KEY = 16  # characters


@dataclass(frozen=True)
class Settings:
    """Everything that can be set on a server.

    batch_size    items that go through a model at once
    wait          seconds that an item waits for others to join it
    queue         most items, and most requests, in progress at once; more are refused with 503
    deadline      seconds from a request's start to its answer, after which it is refused with 504; as many for its body
    max_body      bytes of a request's body
    max_images  images of a request
    max_pixels    pixels of an image, read from its header before it is decoded
    max_texts     texts of a request
    max_text      characters of a text
    max_headers   bytes of all headers together
    keys          API keys as `hash_key` gives them; if empty, no key is needed
    cors          origins whose pages may ask from a browser
    """

    batch_size: int = 32
    wait: float = 0.005
    queue: int = 256
    deadline: float = 30.0
    max_body: int = 20_000_000
    max_images: int = 32
    max_pixels: int = 50_000_000
    max_texts: int = 128
    max_text: int = 2_000
    max_headers: int = 16_384
    keys: tuple[bytes, ...] = field(default=(), repr=False)
    cors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.queue < max(self.max_images, self.max_texts):
            raise ClipadaptError(
                f"The queue of {self.queue} items is too short for one request of {self.max_images} images or "
                f"{self.max_texts} texts; make it longer, or allow fewer."
            )


def open_image(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """The image encoded in `data`, upright RGB; raises `DataError` naming it if it cannot or may not be decoded."""
    check_image(data, name, max_pixels)
    return decode(data, name)


def check_image(data: bytes, name: str, max_pixels: int) -> None:
    """Look at the header only: is it an image of a format that is taken, and not too large?"""
    if not data:
        raise DataError(f"{name} is empty (0 bytes); an image file is needed.")
    try:
        with Image.open(BytesIO(data), formats=_formats()) as image:
            pixels = image.width * image.height
    except Image.DecompressionBombError:
        pixels = max_pixels + 1
    except Exception:  # decoders raise anything on a damaged header
        raise DataError(f"{name} is not an image in a supported format (JPEG, PNG, WebP, GIF, …).") from None
    if pixels > max_pixels:
        raise DataError(f"{name} has more than {max_pixels:,} pixels; shrink it first.")


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def from_data_uri(uri: str, name: str) -> bytes:
    """The bytes of an image given as "data:image/png;base64,…"; nothing else is accepted, URLs in particular."""
    head, comma, data = uri.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise DataError(f'{name} must be given as "data:image/png;base64,…".')
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"{name} is not valid base64.") from None


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[bytes, ...]:
    """The keys of `file` (one per line, # starts a comment) and of $CLIPADAPT_API_KEYS (between commas), hashed."""
    lines = environment.get("CLIPADAPT_API_KEYS", "").split(",")
    if file is not None:
        try:
            lines += [line.partition("#")[0] for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ClipadaptError(f"The file of API keys {file} cannot be read: {error}.") from None
    keys = [key for line in lines if (key := line.strip())]
    if file is not None and not keys:
        raise ClipadaptError(f"The file of API keys {file} is empty; write one key per line.")
    if any(len(key) < _SHORTEST_KEY for key in keys):
        raise ClipadaptError(f"An API key must have at least {_SHORTEST_KEY} characters, or it can be guessed.")
    return tuple(map(hash_key, keys))


def hash_key(key: str) -> bytes:
    """What is kept of an API key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def is_known(key: str, keys: Iterable[bytes]) -> bool:
    """Whether `key` is one of the hashed `keys`, in a time that does not depend on which or how nearly."""
    digest, found = hash_key(key), False
    for known in keys:
        found |= hmac.compare_digest(digest, known)
    return found


__getattr__ = old_names(__name__)
