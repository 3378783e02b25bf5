"""The contact sheet: well-formed, with all images in it, whatever files are called."""

from __future__ import annotations

import base64
import io
import os
import tarfile
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from PIL import Image

from clipadapt.errors import DataError
from clipadapt.search.images import named_image
from clipadapt.search.sheet import Card, Section, write_sheet

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """The elements of a page, and a complaint about any that is not closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_hostile_names_are_only_names(tmp_path):
    names = ["<script>alert(1)<", '" onerror="alert(1)', "javascript:alert(1)", "$title & %41?#.png", "ü 猫.png"]
    paths = []
    for name in names:
        path = str(tmp_path / name.replace("/", "_"))
        Image.new("RGBA", (900, 30), (255, 0, 0, 90)).save(path, "PNG")
        paths.append(path)
    page = tmp_path / "sheet.html"
    write_sheet(page, "<b>$note</b>", [Section([Card(path, ["<i>"]) for path in paths], "<u>")], "<s>")
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "i", "u", "s"}
    assert [image["alt"] for image in found.all("img")] == names
    for link, path in zip(found.all("a"), paths, strict=True):
        assert set(link) == {"class", "href"}
        assert link["href"].startswith("./")
        assert os.path.samefile(tmp_path / unquote(link["href"]), path)
    assert all(name in found.words for name in names)
    assert "<b>$note</b>" in found.words
    for image in found.all("img"):
        kind, data = image["src"].split(",")
        assert kind == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (320, 11)
    assert "default-src 'none'" in next(m["content"] for m in found.all("meta") if "http-equiv" in m)
    assert "http://" not in text


def test_images_that_cannot_be_shown_say_why(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    page = write_sheet(tmp_path / "s.html", "x", [Section([Card(str(broken)), Card("gone.png"), Card("a:b://c")])])
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert found.all("img") == []
    assert len(found.all("a")) == 1
    assert "is not an image in a format that can be read" in text
    assert "gone.png cannot be read" in text


def test_no_folder_to_write_to(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        write_sheet(tmp_path / "missing" / "sheet.html", "x", [])


def test_members_of_tar_files_are_found_by_name(tmp_path):
    data = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(data, "PNG")
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as archive:
        member = tarfile.TarInfo("x/1.png")
        member.size = len(data.getvalue())
        archive.addfile(member, io.BytesIO(data.getvalue()))
    assert named_image(f"{shard}:x/1.png").open().size == (5, 4)
    with pytest.raises(DataError, match=r"no longer has a member 2\.png"):
        named_image(f"{shard}:2.png")
    with pytest.raises(DataError, match=r"gone\.tar"):
        named_image("gone.tar:1.png")
