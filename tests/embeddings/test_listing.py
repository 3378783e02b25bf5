"""What PHOTOS may be: each form gives its images in a fixed order, with what else is known of them."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from clipadapt.embeddings import listing
from clipadapt.embeddings.listing import list_images
from clipadapt.errors import ClipadaptError, DataError
from tests.features.conftest import write_images


def read(source, start=0, stop=None, work=Path("unused")):
    """(names, columns) of a stretch; the listing travels to another process first."""
    found = pickle.loads(pickle.dumps(list_images(source)))
    items, table = found.stretch(start, found.count if stop is None else stop, work)
    assert len(items) == table.num_rows or not table.column_names
    return [item.name for item in items], table.to_pydict()


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """root.png, sea/00.png, sea/deep/00.png, and what is no image or hidden."""
    root = tmp_path / "photos"
    (image,) = (Path(path).read_bytes() for path in write_images(tmp_path / "one", 1))
    for name in ("root.png", "sea/00.PNG", "sea/deep/00.png", ".hidden/00.png", "notes.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image)
    return root


@pytest.fixture
def memory(monkeypatch):
    """A file system that lives in this process's memory, empty."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return MemoryFileSystem()


def test_a_folder(folder):
    names, columns = read(folder)
    assert names == [str(folder / name) for name in ("root.png", "sea/00.PNG", "sea/deep/00.png")]
    assert columns == {"folder": ["", "sea", "sea/deep"]}
    assert read(f"{folder}/") == (names, columns)
    assert read(folder, 1, 2) == (names[1:2], {"folder": ["sea"]})


def test_the_same_folder_behind_urls(folder, memory):
    memory.put(str(folder), "/bucket/photos", recursive=True)
    for source, root in [("memory://bucket/photos", "memory:///bucket/photos"), (folder.as_uri(), folder.as_uri())]:
        names, columns = read(source)
        assert names == [f"{root}/{name}" for name in ("root.png", "sea/00.PNG", "sea/deep/00.png")]
        assert columns == {"folder": ["", "sea", "sea/deep"]}
    (item, *_), _ = list_images("memory://bucket/photos").stretch(0, 3, Path())
    assert item.digest() == list_images(folder).stretch(0, 1, Path())[0][0].digest()


CSV = "image,place,score\nsea/00.PNG,beach,1.5\nhttps://example.org/a.jpg,,2\n"


@pytest.mark.parametrize("form", ["csv", "tsv", "parquet"])
def test_a_table_keeps_its_columns(folder, memory, form):
    file = folder / f"list.{form}"
    file.write_text(CSV.replace(",", "\t") if form == "tsv" else CSV)
    if form == "parquet":
        table = {"image": ["sea/00.PNG", "https://example.org/a.jpg"], "place": ["beach", ""], "score": [1.5, 2.0]}
        pa.parquet.write_table(pa.table(table), file)
    expected = {"place": ["beach", ""], "score": [1.5, 2.0]}
    assert read(file) == ([str(folder / "sea/00.PNG"), "https://example.org/a.jpg"], expected)
    assert read(file, 1, 2) == (["https://example.org/a.jpg"], {"place": [""], "score": [2.0]})
    memory.put(str(file), f"/bucket/list.{form}")
    names, columns = read(f"memory://bucket/list.{form}")
    assert names == ["memory://bucket/sea/00.PNG", "https://example.org/a.jpg"]
    assert columns == expected


def test_a_stretch_of_a_parquet_file_spans_row_groups(tmp_path):
    numbers = list(range(25))
    table = pa.table({"image": [f"{number}.png" for number in numbers], "number": numbers})
    pa.parquet.write_table(table, tmp_path / "list.parquet", row_group_size=4)
    for start, stop in [(0, 25), (3, 9), (4, 8), (24, 25), (7, 7)]:
        names, columns = read(tmp_path / "list.parquet", start, stop)
        assert columns == {"number": numbers[start:stop]}
        assert names == [str(tmp_path / f"{number}.png") for number in numbers[start:stop]]


def test_images_in_a_parquet_file(tmp_path, monkeypatch):
    images = [Path(path).read_bytes() for path in write_images(tmp_path, 6)]
    for cells in (images, [{"bytes": data, "path": None} for data in images]):
        file = tmp_path / "in.parquet"
        pa.parquet.write_table(pa.table({"image": cells, "n": range(6)}), file, row_group_size=2)
        found = list_images(file)
        items, table = found.stretch(2, 5, tmp_path)
        assert [item.read() for item in items] == images[2:5]
        assert [item.name for item in items] == [f"{file} row {row}" for row in (3, 4, 5)]
        assert table.to_pydict() == {"n": [2, 3, 4]}
        identity = found.identity
        pa.parquet.write_table(pa.table({"image": cells[::-1], "n": range(6)}), file, row_group_size=2)
        assert list_images(file).identity != identity
    monkeypatch.setattr(listing, "PART_BYTES", 2000)
    assert list_images(file).parts > 1, "what is held in memory is bounded"


def test_tar_shards(tmp_path, memory):
    image = Path(write_images(tmp_path, 1)[0]).read_bytes()
    facts = [{"year": 2020, "tags": ["a"]}, {"year": "old"}, {}]
    for number, fields in enumerate(facts):
        files = {"x.json": json.dumps(fields).encode(), "x.png": image, "y.txt": b"a dog\n", "y.jpg": image}
        write_tar(tmp_path / f"pets-{number:02}.tar", files | {"z.txt": b"no image"})
        memory.put(str(tmp_path / f"pets-{number:02}.tar"), f"/bucket/pets-{number:02}.tar")
    stars, braces = f"{tmp_path}/pets-*.tar", f"{tmp_path}/pets-{{00..02}}.tar"
    names, columns = read(stars)
    assert names == [f"{tmp_path}/pets-{number:02}.tar:{name}" for number in range(3) for name in ("x.png", "y.jpg")]
    assert columns == {
        "year": ["2020", None, "old", None, None, None],  # of different kinds: text
        "tags": ['["a"]', None, None, None, None, None],
        "txt": [None, "a dog"] * 3,
    }
    assert list_images(stars).identity == list_images(braces).identity
    assert (list_images(stars).count, list_images(stars).parts) == (3, 3)
    assert read(stars, 1, 2)[1] == {"year": ["old", None], "txt": [None, "a dog"]}
    for source, root in [
        ("memory://bucket/pets-*.tar", "memory:///bucket"),
        ("memory://bucket/pets-{00..02}.tar", "memory://bucket"),
    ]:
        found, facts = read(source, work=tmp_path / "work")
        assert found == [name.replace(str(tmp_path), root) for name in names]
        assert facts == columns
    items, _ = list_images("memory://bucket/pets-*.tar").stretch(0, 3, tmp_path / "work")
    assert [item.read() for item in items] == [image] * 6


def test_a_text_list(folder, memory):
    text = "\ufeffsea/00.PNG\n\n  https://example.org/a b.jpg \n"
    (folder / "list.txt").write_text(text)
    memory.pipe("/bucket/list.txt", text.encode())
    assert read(folder / "list.txt") == ([str(folder / "sea/00.PNG"), "https://example.org/a b.jpg"], {})
    assert read("memory://bucket/list.txt")[0] == ["memory://bucket/sea/00.PNG", "https://example.org/a b.jpg"]


def test_parts_are_of_a_bounded_number_of_images(folder, monkeypatch):
    assert list_images(folder).parts == 1
    monkeypatch.setattr(listing, "PART_IMAGES", 2)
    assert list_images(folder).parts == 2


def test_a_changed_list_has_another_identity(folder):
    before = list_images(folder).identity
    assert list_images(folder).identity == before
    (folder / "sea/00.PNG").rename(folder / "sea/01.png")
    assert list_images(folder).identity != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none", None, "none does not exist; give a folder"),
        ("none-*.tar", None, r"none-\*\.tar matches no \.tar file"),
        ("a.pdf", b"", r"a\.pdf cannot be embedded"),
        ("a.txt", b"\n", r"a\.txt is empty"),
        ("a.txt", b"\xff", r"a\.txt is not UTF-8"),
        ("a.csv", b"file,x\na,b\n", r"a\.csv needs one column 'image' .* its columns are: file, x"),
        ("a.csv", b"image,x\na\n", r"a\.csv cannot be read as a table: .*Expected 2 columns"),
        ("a.csv", b"", r"a\.csv cannot be read as a table"),
        ("a.parquet", b"PAR1", r"a\.parquet cannot be read as a table"),
    ],
)
def test_what_cannot_be_listed_has_its_sentence(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list_images(tmp_path / name)


def test_what_cannot_be_read_in_a_shard_has_its_sentence(tmp_path, memory):
    image = Path(write_images(tmp_path, 1)[0]).read_bytes()
    (tmp_path / "a.tar").write_bytes(b"no tar")
    write_tar(tmp_path / "b.tar", {"1.png": image, "1.json": b"{"})
    (tmp_path / "c.csv").write_text("image,x\n,1\n")
    for name, message in [
        ("a.tar", r"a\.tar cannot be read as an uncompressed tar"),
        ("b.tar", r"b\.tar, sample '1': its \.json"),
        ("c.csv", r"c\.csv row 2: a path, a URL"),
    ]:
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)
    with pytest.raises(DataError, match=r"memory://bucket/x\.tar does not exist"):
        read("memory://bucket/x.tar", work=tmp_path / "work")
    with pytest.raises(DataError, match="holds no images"):
        list_images("memory://bucket/nothing")
    with pytest.raises(ClipadaptError, match="Protocol not known: gopher"):
        list_images("gopher://x/photos")
