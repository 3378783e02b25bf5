"""Embeddings on disk: any number of processes give what one would, and an incomplete folder is refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from datetime import datetime
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from clipadapt.data import GeneratedItem
from clipadapt.embeddings import Embeddings, encode_shard
from clipadapt.embeddings.listing import list_images
from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.features import encode_images
from tests.features.conftest import noise


def encode_all(backbone, images, out, count, **options):
    for index in range(count):
        encode_shard(backbone, images, out, (index, count), **options)


@pytest.mark.parametrize("count", [1, 4, 40])  # 40: more parts than images
def test_parts_make_up_the_whole(backbone, paths, tmp_path, count):
    columns = {"number": list(range(30)), "kind": ["even", "odd"] * 15}
    encode_all(backbone, paths, tmp_path / "out", count, batch_size=4, columns=columns)
    found = Embeddings(tmp_path / "out")
    expected = encode_images(backbone, paths, precision="float16", cache=False)
    assert (len(found), found.dim, len(found.parts)) == (30, 8, count)
    np.testing.assert_array_equal(np.concatenate(found.parts), expected.features.numpy().astype(np.float16))
    assert found.names == paths
    assert found.table["digest"].to_pylist() == expected.digests
    assert found.table["number"].to_pylist() == list(range(30))
    assert found.backbone == {"source": backbone.source, "fingerprint": backbone.fingerprint}
    assert found.image_fingerprint == backbone.image_fingerprint
    found.check()


def test_other_programs_can_read_it(backbone, paths, tmp_path):
    encode_all(backbone, paths, tmp_path, 2)
    matrix = np.load(tmp_path / "part-00001-of-00002.npy", mmap_mode="r")
    table = pyarrow.parquet.read_table(tmp_path / "part-00001-of-00002.parquet")
    assert matrix.shape == (15, 8)
    assert matrix.dtype == np.float16
    assert table["name"].to_pylist() == paths[15:]
    np.testing.assert_allclose(np.linalg.norm(matrix.astype(np.float32), axis=1), 1, atol=2e-3)


def test_rows_and_blocks(backbone, paths, tmp_path):
    encode_all(backbone, paths, tmp_path, 4)
    found = Embeddings(tmp_path)
    whole = np.concatenate(found.parts)
    np.testing.assert_array_equal(found.rows([29, 0, 7, 8, 0]), whole[[29, 0, 7, 8, 0]])
    assert found.rows([]).shape == (0, 8)
    blocks = list(found.blocks(3))
    assert max(len(block) for _, block in blocks) == 3
    assert [first for first, _ in blocks] == list(np.cumsum([0, *(len(b) for _, b in blocks)]))[:-1]
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), whole)


def test_a_part_that_is_done_is_not_done_again(backbone, paths, tmp_path):
    first = encode_shard(backbone, paths, tmp_path, (1, 3))
    done = backbone.seen
    assert encode_shard(backbone, paths, tmp_path, (1, 3)) == first
    assert backbone.seen == done == 10
    stem = "part-00001-of-00003"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "images") == [
        f"{stem}.json",
        f"{stem}.npy",
        f"{stem}.parquet",
    ]


def test_an_interrupted_part_continues(backbone, paths, tmp_path):
    encode = backbone.encode_images

    def interrupted(pixels):
        if backbone.seen >= 20:
            raise KeyboardInterrupt
        return encode(pixels)

    backbone.encode_images = interrupted
    with pytest.raises(KeyboardInterrupt):
        encode_shard(backbone, paths, tmp_path / "out", batch_size=5)
    backbone.encode_images = encode
    encode_shard(backbone, paths, tmp_path / "out", batch_size=5)
    assert backbone.seen == 30


def test_missing_parts_are_named(backbone, paths, tmp_path):
    with pytest.raises(ArtifactError, match="no finished embeddings"):
        Embeddings(tmp_path)
    for index in (0, 2, 4):
        encode_shard(backbone, paths, tmp_path, (index, 5))
    with pytest.raises(ArtifactError, match=r"part 1, 3 of 5 "):
        Embeddings(tmp_path)


def test_unreadable_images_are_listed(backbone, paths, tmp_path):
    bad = tmp_path / "bad.png"
    bad.touch()
    listed = [*paths[:4], str(bad), *paths[4:8]]
    encode_all(backbone, listed, tmp_path / "out", 3, on_error="skip", columns={"place": list(range(9))})
    found = Embeddings(tmp_path / "out")
    assert found.names == paths[:8]
    assert found.table["place"].to_pylist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert [name for name, _ in found.skipped] == [str(bad)]


def test_parts_of_different_work_do_not_mix(backbone, other_backbone, paths, tmp_path):
    encode_shard(backbone, paths, tmp_path, (0, 2))
    for model, images, fast, what in [
        (other_backbone, paths, False, "by another model"),
        (backbone, paths[1:], False, "of another list of images"),
        (backbone, paths, True, "with the other choice of fast_decode"),
    ]:
        with pytest.raises(ArtifactError, match=f"was made {what}; use a new folder"):
            encode_shard(model, images, tmp_path, (0, 2), fast_decode=fast)
    encode_shard(other_backbone, paths, tmp_path, (1, 2))
    with pytest.raises(ArtifactError, match="differ in their image_fingerprint"):
        Embeddings(tmp_path)


def test_damage_is_found(backbone, paths, tmp_path):
    encode_all(backbone, paths, tmp_path, 3)
    file = tmp_path / "part-00001-of-00003.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"00001-of-00003\.npy"):
        Embeddings(tmp_path).check()
    for damaged in (whole[:-1], b"", b"\x93NUMPY"):
        file.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"00001-of-00003\.npy"):
            Embeddings(tmp_path)
    file.unlink()
    with pytest.raises(ArtifactError, match="missing or damaged"):
        Embeddings(tmp_path)
    marker = tmp_path / "part-00001-of-00003.json"
    state = json.loads(marker.read_text())
    marker.write_text("{")
    with pytest.raises(ArtifactError, match=r"00001-of-00003\.json is damaged"):
        Embeddings(tmp_path)
    marker.write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(ArtifactError, match="upgrade clipadapt"):
        Embeddings(tmp_path)


@pytest.mark.parametrize("shard", [(3, 3), (-1, 3), (0, 0)])
def test_shard_numbers_out_of_range(backbone, paths, tmp_path, shard):
    with pytest.raises(ClipadaptError, match="numbered from 0"):
        encode_shard(backbone, paths, tmp_path, shard)


@pytest.mark.parametrize("columns", [{"year": [2020]}, {"name": ["x"] * 30}])
def test_columns_that_do_not_fit_are_refused(backbone, paths, tmp_path, columns):
    with pytest.raises(ClipadaptError, match="one value per image"):
        encode_shard(backbone, paths, tmp_path, columns=columns)


def test_the_matrix_is_mapped_not_read(backbone, tmp_path):
    images = np.zeros((3, 5, 5, 3), np.uint8)
    encode_all(backbone, images, tmp_path, 2)
    found = Embeddings(tmp_path)
    assert str(tmp_path / "part-00001-of-00002.npy") in Path("/proc/self/maps").read_text()
    assert sum(len(part) for part in found.parts) == 3


# -- what is known of the images -----------------------------------------------------------------------------------


def test_size_and_date_are_noted(backbone, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    exif.get_ifd(0x8769)[0x9003] = "2021:07:04 12:30:00"
    noise(0, (20, 24)).save(tmp_path / "a.jpg", exif=exif)
    noise(1, (20, 24)).save(tmp_path / "b.png")
    images = [tmp_path / "a.jpg", tmp_path / "b.png", noise(2)]
    encode_shard(backbone, images, tmp_path / "out")
    facts = Embeddings(tmp_path / "out").table.select(["width", "height", "taken", "year"])
    assert facts.schema.types == [pa.int32(), pa.int32(), pa.timestamp("ms"), pa.int32()]
    assert [[*row.values()] for row in facts.to_pylist()] == [
        [24, 20, datetime(2021, 7, 4, 12, 30), 2021],
        [20, 24, None, None],
        [None, None, None, None],  # it has no file
    ]


def test_what_a_source_knows_goes_before_what_is_noted(backbone, paths, tmp_path):
    lines = ["image,name,year", *(f"{path},n{number},{1900 + number}" for number, path in enumerate(paths))]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    encode_all(backbone, list_images(tmp_path / "list.csv"), tmp_path / "out", 3)
    found = Embeddings(tmp_path / "out")
    assert found.names == paths
    assert found.table["source_name"].to_pylist() == [f"n{number}" for number in range(30)]
    assert found.table["year"].to_pylist() == list(range(1900, 1930))


def test_a_column_of_other_kinds_in_other_parts_becomes_text(backbone, paths, tmp_path):
    columns = {"n": [1, 2, "three", "four"], "m": [1, None, 2.5, None]}
    encode_all(backbone, paths[:4], tmp_path / "out", 2, columns=columns)
    table = Embeddings(tmp_path / "out").table
    assert table["n"].to_pylist() == ["1", "2", "three", "four"]
    assert table["m"].to_pylist() == [1.0, None, 2.5, None]


# -- somewhere else --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "file"])
def bucket(request, tmp_path, monkeypatch):
    """The URL of an empty folder."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return "memory://bucket" if request.param == "memory" else (tmp_path / "bucket").as_uri()


def test_images_and_parts_behind_urls(backbone, paths, tmp_path, bucket, monkeypatch):
    system, place = fsspec.core.url_to_fs(bucket)
    system.put(os.path.dirname(paths[0]), f"{place}/photos", recursive=True)
    read, cat_file = [], type(system).cat_file  # of the class: each thread has a file system of its own

    def noted(self, path, *args, **options):
        if "/photos/" in path:
            read.append(path)
        return cat_file(self, path, *args, **options)

    monkeypatch.setattr(type(system), "cat_file", noted)
    encode_all(backbone, list_images(f"{bucket}/photos"), f"{bucket}/out", 3)
    assert sorted(read) == sorted(f"{place}/photos/{os.path.basename(path)}" for path in paths), "each is read once"
    encode_all(backbone, paths, tmp_path / "local", 3)
    found, local = Embeddings(f"{bucket}/out"), Embeddings(tmp_path / "local")
    found.check()
    np.testing.assert_array_equal(np.concatenate(found.parts), np.concatenate(local.parts))
    assert found.table["digest"].equals(local.table["digest"])
    assert found.table["width"].equals(local.table["width"])
    stem = "part-00001-of-00003"
    assert system.cat(f"{place}/out/{stem}.npy") == (tmp_path / "local" / f"{stem}.npy").read_bytes()

    backbone.seen = 0
    encode_all(backbone, list_images(f"{bucket}/photos"), f"{bucket}/out", 3)
    assert backbone.seen == 0, "what is there is not done again"
    system.rm(f"{place}/out/{stem}.json")
    with pytest.raises(ArtifactError, match="part 1 of 3 is not done yet"):
        Embeddings(f"{bucket}/out")
    system.rm(f"{place}/photos/{os.path.basename(paths[7])}")
    with pytest.raises(ArtifactError, match="another list of images"):
        encode_shard(backbone, list_images(f"{bucket}/photos"), f"{bucket}/out", (0, 3))


def test_an_interrupted_upload_goes_on_with_the_finished_part(backbone, paths, tmp_path, monkeypatch):
    system, put = fsspec.filesystem("file"), fsspec.filesystem("file").put_file
    url = (tmp_path / "bucket").as_uri()

    def lost(local, there, **options):
        if there.endswith(".parquet"):
            raise ConnectionError("the line is down")
        put(local, there, **options)

    monkeypatch.setattr(system, "put_file", lost)
    with pytest.raises(ClipadaptError, match=r"bucket cannot be reached: the line is down\.$"):
        encode_shard(backbone, paths, url)
    with pytest.raises(ArtifactError, match="no finished embeddings"):
        Embeddings(url)
    monkeypatch.setattr(system, "put_file", put)
    encode_shard(backbone, paths, url)
    assert backbone.seen == 30
    assert len(Embeddings(url)) == 30


# -- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["numpy.save", "pyarrow.parquet.write_table", "clipadapt.features.store.save_file"])
def test_a_full_disk_leaves_no_half_part(backbone, paths, tmp_path, monkeypatch, fails):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fails, full)
        with pytest.raises(ClipadaptError, match=r"cannot be written.*No space left on device"):
            encode_shard(backbone, paths, tmp_path / "out")
    assert not list((tmp_path / "out").glob("part-*"))
    assert not list((tmp_path / "out").rglob("*.tmp"))
    encode_shard(backbone, paths, tmp_path / "out")
    Embeddings(tmp_path / "out").check()
    assert backbone.seen == (60 if "store" in fails else 30), "what was kept is not done again"


def test_a_disk_that_is_really_full(backbone, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        items = [GeneratedItem(str(number), str(number), partial(noise, number)) for number in range(1000)]
        with pytest.raises(ClipadaptError, match=r"cannot be written.*No space left on device"):
            encode_shard(backbone, items, disk / "out")
        assert not list((disk / "out").glob("part-*"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        encode_shard(backbone, items, disk / "out")
        Embeddings(disk / "out").check()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# -- fast decoding ---------------------------------------------------------------------------------------------------


def test_fast_decode_is_kept_apart_and_stays_close(tmp_path):
    from clipadapt.backbones import load_backbone

    backbone = load_backbone()
    smooth = noise(0, (8, 6)).resize((1600, 1200), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "large.jpg", quality=90)
    images = [tmp_path / "large.jpg", noise(1, (30, 40))]
    whole, fast = (encode_images(backbone, images, fast_decode=fast).features for fast in (False, True))
    again = encode_images(backbone, images).features
    assert (whole == again).all(), "features of whole images are not those of the cache's other kind"
    assert not (whole[0] == fast[0]).all()
    assert whole[0] @ fast[0] > 0.99
    assert (whole[1] == fast[1]).all(), "what is no JPEG is decoded as ever"
    encode_shard(backbone, images, tmp_path / "out", fast_decode=True)
    found = Embeddings(tmp_path / "out")
    assert json.loads((tmp_path / "out/part-00000-of-00001.json").read_text())["fast_decode"] is True
    np.testing.assert_array_equal(found.parts[0], fast.numpy().astype(np.float16))
    with pytest.raises(ClipadaptError, match="fast_decode is for whole images"):
        encode_images(backbone, images, fast_decode=True, views=2)
