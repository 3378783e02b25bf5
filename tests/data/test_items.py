"""Every kind of image file has one defined outcome: upright 8-bit RGB, or one clear sentence that names it."""

from __future__ import annotations

import pickle
import struct
import zlib
from datetime import datetime
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from clipadapt.data import BytesItem, FileItem, GeneratedItem, ImageItem, as_items, image_list, items
from clipadapt.errors import DataError

RED, WHITE, GREEN = (255, 0, 0), (255, 255, 255), (0, 128, 0)


def save(image, path, **options):
    image.save(path, **options)
    return FileItem(str(path))


def noise(size=(32, 24), mode="RGB"):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)).convert(mode)


def test_rgb_is_returned_as_stored(tmp_path):
    image = noise()
    opened = save(image, tmp_path / "a.png").open()
    assert opened.mode == "RGB"
    assert opened.tobytes() == image.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    item = save(noise(), tmp_path / "turned.png", exif=exif)
    with Image.open(item.path) as stored:
        assert item.open().tobytes() == ImageOps.exif_transpose(stored).tobytes()
    assert item.open().size == ((32, 24) if orientation < 5 else (24, 32))


def test_damaged_exif_leaves_the_image_readable(tmp_path):
    broken = b"Exif\x00\x00MS\x00*\x00\x00\x00\x08" + bytes(20)
    item = save(noise(), tmp_path / "odd.png", exif=broken)
    assert item.open().size == (32, 24)


def test_transparency_is_laid_on_white(tmp_path):
    clear_red = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half_black = Image.new("LA", (4, 4), (0, 128))
    assert save(clear_red, tmp_path / "rgba.png").open().getpixel((0, 0)) == WHITE
    assert save(half_black, tmp_path / "la.png").open().getpixel((0, 0)) == (127, 127, 127)


def test_palette_with_and_without_transparency(tmp_path):
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([*RED, *GREEN])
    palette.putpixel((1, 0), 1)
    opaque = save(palette, tmp_path / "opaque.png").open()
    assert (opaque.getpixel((0, 0)), opaque.getpixel((1, 0))) == (RED, GREEN)
    clear = save(palette, tmp_path / "clear.png", transparency=0).open()
    assert (clear.getpixel((0, 0)), clear.getpixel((1, 0))) == (WHITE, GREEN)


def test_cmyk_becomes_rgb(tmp_path):
    red, green, blue = save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "print.jpg").open().getpixel((4, 4))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, ending):
    grey = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    opened = save(Image.fromarray(grey), tmp_path / f"x-ray.{ending}").open()
    assert np.array_equal(np.asarray(opened)[..., 0], np.rint(grey / 257).astype(np.uint8))


def test_float_grey_is_scaled_from_0_to_1_and_refused_beyond(tmp_path):
    assert save(Image.new("F", (4, 4), 0.5), tmp_path / "f.tif").open().getpixel((0, 0)) == (128, 128, 128)
    with pytest.raises(DataError, match=r"big\.tif .*grey values run from 300 to 300, where 0 to 1 is expected"):
        save(Image.new("F", (4, 4), 300.0), tmp_path / "big.tif").open()


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame(tmp_path, ending):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    item = save(frames[0], tmp_path / f"moving.{ending}", save_all=True, append_images=frames[1:])
    assert np.abs(np.subtract(item.open().getpixel((0, 0)), RED)).max() <= 2  # WebP is lossy


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "gif", "tif", "bmp"])
def test_a_truncated_image_is_refused(tmp_path, ending):
    item = save(noise(), tmp_path / f"cut.{ending}")
    data = item.read()
    (tmp_path / f"cut.{ending}").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=rf"cut\.{ending} is (a damaged or truncated|not an) image"):
        item.open()


def test_a_corrupt_image_is_refused(tmp_path):
    item = save(noise(), tmp_path / "bad.png")
    data = bytearray(item.read())
    data[60:200] = bytes(140)
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(DataError, match=r"bad\.png is a damaged or truncated image"):
        item.open()


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(DataError, match=r"empty\.jpg is empty \(0 bytes\)"):
        FileItem(str(tmp_path / "empty.jpg")).open()


def test_a_text_file_is_refused(tmp_path):
    (tmp_path / "note.jpg").write_text("not an image")
    with pytest.raises(DataError, match=r"note\.jpg is not an image in a format that can be read"):
        FileItem(str(tmp_path / "note.jpg")).open()


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jpg cannot be read: No such file"):
        FileItem(str(tmp_path / "gone.jpg")).open()
    with pytest.raises(DataError, match="is a folder, not an image"):
        FileItem(str(tmp_path)).digest()


def png(width, height, bits, kind, rows):
    """A PNG file made by hand, for what Pillow does not write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_colour_keeps_its_high_bytes():
    row = b"\0" + struct.pack(">6H", 0xFFFF, 0x8000, 0, 0x1234, 0xABCD, 0x00FF)
    opened = BytesItem("scan", png(2, 1, 16, 2, row)).open()
    assert (opened.getpixel((0, 0)), opened.getpixel((1, 0))) == ((0xFF, 0x80, 0), (0x12, 0xAB, 0))


def test_an_enormous_image_is_refused_before_it_is_decoded(monkeypatch):
    item = BytesItem("bomb.png", png(50_000, 50_000, 8, 2, b""))
    with pytest.raises(DataError, match=r"bomb\.png has more than 178,956,970 pixels; shrink it first"):
        item.open()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some programs do
    with pytest.raises(DataError, match=r"bomb\.png has more than 178,956,970 pixels"):
        item.open()


def test_the_bound_itself_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(items, "MAX_PIXELS", 32 * 24)
    assert save(noise(), tmp_path / "a.png").open().size == (32, 24)
    with pytest.raises(DataError, match=r"b\.png has more than 768 pixels"):
        save(noise((33, 24)), tmp_path / "b.png").open()


def test_digest_follows_the_content_not_the_name(tmp_path):
    first, copy = save(noise(), tmp_path / "a.png"), save(noise(), tmp_path / "b.png")
    other = save(noise((31, 24)), tmp_path / "c.png")
    assert first.digest() == copy.digest() == BytesItem("in memory", first.read()).digest()
    assert first.digest() != other.digest()
    assert len(first.digest()) == 32


def test_digest_of_decoded_and_generated_images():
    wide, tall = ImageItem("wide", Image.new("RGB", (4, 2))), ImageItem("tall", Image.new("RGB", (2, 4)))
    assert wide.digest() == ImageItem("again", Image.new("RGB", (4, 2))).digest() != tall.digest()
    one, two = (GeneratedItem("drawn", key, noise) for key in ("noise 1", "noise 2"))
    assert one.digest() != two.digest()
    assert one.open().tobytes() == noise().tobytes()


def test_part_of_a_file_is_an_image(tmp_path):
    encoded = BytesIO()
    noise().save(encoded, "PNG")
    (tmp_path / "pack").write_bytes(b"before" + encoded.getvalue() + b"after")
    item = FileItem(str(tmp_path / "pack"), 6, len(encoded.getvalue()), "pack:a.png")
    assert item.name == "pack:a.png"
    assert item.open().tobytes() == noise().tobytes()


def test_items_travel_to_other_processes(tmp_path):
    kinds = [
        save(noise(), tmp_path / "a.png"),
        BytesItem("bytes", (tmp_path / "a.png").read_bytes()),
        ImageItem("pixels", noise()),
        GeneratedItem("drawn", "noise", noise),
    ]
    for item in kinds:
        copy = pickle.loads(pickle.dumps(item))
        assert (copy.name, copy.digest(), copy.open().tobytes()) == (item.name, item.digest(), noise().tobytes())


def test_as_items_takes_every_usual_form(tmp_path):
    path = save(noise(), tmp_path / "a.png").path
    pixels = np.asarray(noise())
    forms = [path, tmp_path / "a.png", noise(), FileItem(path), pixels]
    assert [item.open().tobytes() for item in as_items(forms)] == [noise().tobytes()] * 5
    assert as_items(path) == as_items([path]) == [FileItem(path)]
    assert as_items(image_list([path], ["cat"])) == [FileItem(path)]
    assert len(as_items(np.stack([pixels, pixels]))) == 2
    grey = as_items(np.full((3, 8, 8), 7, np.uint8))
    assert [item.open().getpixel((0, 0)) for item in grey] == [(7, 7, 7)] * 3
    assert as_items([]) == []


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (np.zeros((8, 8, 3), np.uint8), r"shape \(N,H,W,3\) or \(N,H,W\), not \(8, 8, 3\); put a single image in a"),
        (np.zeros((2, 8, 8)), "Image 0 is an array of float64; uint8 values 0 to 255 are needed"),
        (np.zeros((2, 8, 8, 5), np.uint8), r"Image 0 has shape \(8, 8, 5\)"),
        (["a.jpg", 3], "Image 1 is a int; a path, PIL image or uint8 array is needed"),
        (7, "not int"),
    ],
)
def test_as_items_refuses_what_is_not_an_image(images, sentence):
    with pytest.raises(DataError, match=sentence):
        as_items(images)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "TIFF"])
def test_the_head_tells_size_and_date(form):
    exif = Image.Exif()
    exif[0x0112] = 8  # on its side
    exif.get_ifd(0x8769)[0x9003] = "2021:07:04 12:30:00"
    file = BytesIO()
    noise((32, 24)).save(file, form, exif=exif)
    found = items.header(file.getvalue())
    assert (found["width"], found["height"]) == items.decode(file.getvalue(), "it").size == (24, 32)
    if form != "TIFF":  # Pillow writes no such date there
        assert found["taken"] == datetime(2021, 7, 4, 12, 30)


def test_a_head_that_tells_less_or_nothing(monkeypatch):
    png, jpeg = BytesIO(), BytesIO()
    noise().save(png, "PNG")
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "0000:00:00 00:00:00"
    noise().save(jpeg, "JPEG", exif=exif)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)  # nothing is decoded
    assert items.header(png.getvalue()) == {"width": 32, "height": 24}
    assert items.header(jpeg.getvalue()) == {"width": 32, "height": 24, "taken": None}
    assert items.header(b"") == items.header(b"no image") == items.header(jpeg.getvalue()[:20]) == {}


def test_a_jpeg_is_reduced_only_as_far_as_was_asked(tmp_path):
    large, small = save(noise((800, 600)), tmp_path / "a.jpg"), save(noise((90, 60)), tmp_path / "b.jpg")
    assert large.open_reduced(100).size == (200, 150)
    assert large.open_reduced(75).size == (100, 75)
    assert large.open_reduced(301).size == large.open().size == (800, 600)
    assert small.open_reduced(100).size == (90, 60)
    assert save(noise((800, 600)), tmp_path / "c.png").open_reduced(100).size == (800, 600)
