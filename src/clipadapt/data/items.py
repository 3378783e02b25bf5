"""One item, such as an image, read only when it is needed: where it is, how it is decoded, what identifies it."""

from __future__ import annotations

import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b
from io import BytesIO
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from clipadapt.errors import DataError

if TYPE_CHECKING:
    import torch

# Larger images are refused before they are decoded: as RGB this many pixels already take 0.5 GB.
MAX_PIXELS = 178_956_970

# What Pillow's decoders raise on damaged files besides OSError.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, KeyError, TypeError)

# How an image stored with this EXIF orientation is turned upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)


Content = TypeVar("Content", covariant=True)


class Item(ABC, Generic[Content]):
    """One item, whose content `open` gives. `name` is shown to users (a path, or "pets.parquet row 12")."""

    name: str

    @abstractmethod
    def open(self) -> Content:
        """The content: of an image, upright 8-bit RGB; raises `DataError` naming the item when it cannot be decoded."""

    @abstractmethod
    def digest(self) -> str:
        """32 hex digits that identify the content; taken from the encoded bytes, so nothing is decoded."""

    def fetched(self) -> Item[Content]:
        """The same item with its bytes in memory where each reading is a transfer, such as over a network."""
        return self

    def open_reduced(self, least: int) -> Content:
        """As `open`, but a JPEG may be decoded smaller, its shorter side still at least `least` pixels."""
        return self.open()


class EncodedItem(Item[Image.Image]):
    """An image kept in an image format (JPEG, PNG, WebP, …); subclasses say where its bytes are."""

    @abstractmethod
    def read(self) -> bytes:
        """The encoded bytes; raises `DataError` when they cannot be reached."""

    def open(self) -> Image.Image:
        return decode(self.read(), self.name)

    def open_reduced(self, least: int) -> Image.Image:
        return decode(self.read(), self.name, least)

    def digest(self) -> str:
        return hash_bytes(self.read())


@dataclass(frozen=True)
class FileItem(EncodedItem):
    """An image file, or a stretch of a larger file (a member of a tar shard)."""

    path: str
    start: int = 0  # bytes
    length: int = -1  # bytes; -1: to the end
    label: str = ""  # what to call it instead of its path

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.label or self.path

    def read(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                return file.read(self.length)
        except IsADirectoryError:
            raise DataError(f"{self.path} is a folder, not an image; image_folder() reads folders.") from None
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {error.strerror or error}.") from None


@dataclass(frozen=True)
class BytesItem(EncodedItem):
    """An encoded image in memory."""

    name: str
    data: bytes = field(repr=False)

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True)
class ImageItem(Item[Image.Image]):
    """A decoded image in memory."""

    name: str
    image: Image.Image = field(repr=False)

    def open(self) -> Image.Image:
        try:
            return to_rgb(self.image)
        except _DECODE_ERRORS as error:
            raise DataError(f"{self.name} cannot be decoded: {error}.") from None

    def digest(self) -> str:
        image = self.open()
        return hash_bytes(f"pixels {image.width}x{image.height} ".encode() + image.tobytes())


@dataclass(frozen=True)
class GeneratedItem(Item[Image.Image]):
    """An image that `draw` makes on demand; equal `key`s promise equal images.

    `draw` must be a module-level function or a method of a picklable object for the item to travel to other processes.
    """

    name: str
    key: str  # everything the image depends on, the drawing code's version included
    draw: Callable[[], Image.Image] = field(repr=False)

    def open(self) -> Image.Image:
        return to_rgb(self.draw())

    def digest(self) -> str:
        return hash_bytes(b"generated " + self.key.encode())


@dataclass(frozen=True)
class FeatureItem(Item[Image.Image]):
    """An example whose only content is its unit feature (D,); `features.encode_images` uses it unchanged."""

    name: str
    feature: torch.Tensor = field(repr=False)

    def open(self) -> Image.Image:
        raise DataError(f"{self.name} is a feature and has no pixels.")

    def digest(self) -> str:
        return hash_bytes(b"feature " + self.feature.numpy().tobytes())


def hash_bytes(data: bytes) -> str:
    """blake2b of `data`, 32 hex digits."""
    return blake2b(data, digest_size=16).hexdigest()


def decode(data: bytes, name: str, least: int | None = None) -> Image.Image:
    """The image encoded in `data` as upright 8-bit RGB (see `to_rgb`); of an animation, the first frame.

    With `least`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves at least that many pixels a side.
    Raises `DataError` naming it when `data` is empty, truncated, corrupt, not an image, or above `MAX_PIXELS`.
    """
    if not data:
        raise DataError(f"{name} is empty (0 bytes); an image file is needed.")
    try:
        with Image.open(BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if least is not None:
                image.draft(None, (least, least))
            return to_rgb(image)
    except UnidentifiedImageError:
        raise DataError(f"{name} is not an image in a format that can be read (JPEG, PNG, WebP, …).") from None
    except Image.DecompressionBombError:  # ours, or Pillow's own, which a program may have lifted
        raise DataError(f"{name} has more than {MAX_PIXELS:,} pixels; shrink it first.") from None
    except _DECODE_ERRORS as error:
        raise DataError(f"{name} is a damaged or truncated image: {str(error).rstrip('.')}.") from None


def header(data: bytes) -> dict[str, Any]:
    """What the head of an encoded image says: `width` and `height` in pixels, upright; `taken`, a datetime.

    `taken` is EXIF's DateTimeOriginal, if there is one. Nothing is decoded; {} where the head cannot be read.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            width, height = image.size
            # Pillow decodes a whole PNG to look for EXIF data behind its pixels.
            if "exif" not in image.info and image.format != "TIFF":
                return {"width": width, "height": height}
            exif = image.getexif()
            if exif.get(ExifTags.Base.Orientation) in _ON_ITS_SIDE and image.format != "TIFF":  # which turns itself
                width, height = height, width
            taken = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal)
    except (Image.DecompressionBombError, *_DECODE_ERRORS):
        return {}
    return {"width": width, "height": height, "taken": _moment(taken)}


def _moment(text: Any) -> datetime | None:
    try:
        return datetime.strptime(str(text).strip("\0 "), "%Y:%m:%d %H:%M:%S")
    except ValueError:  # also of clocks that were never set: "0000:00:00 00:00:00"
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` turned upright by its EXIF orientation, as 8-bit RGB.

    Transparency is laid on white; 16-bit grey is scaled from 0..65535 and float grey from 0..1 to 0..255;
    colour profiles are ignored, as CLIP's own preprocessing does. The argument is left as it is.
    """
    image.load()
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_8_bit(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it rewrites the whole EXIF block and fails where any part of it is damaged.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except (SyntaxError, ValueError, struct.error):  # the pixels are still sound
        return image
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _grey_to_8_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    top = 1.0 if image.mode == "F" else 65535.0
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= top):
        raise ValueError(f"its grey values run from {low:g} to {high:g}, where 0 to {top:g} is expected")
    return Image.fromarray((values.astype(np.float64) * (255 / top) + 0.5).astype(np.uint8))
