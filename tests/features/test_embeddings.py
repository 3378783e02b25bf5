"""Embeddings on disk: any number of processes give what one would, and an incomplete folder is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.features import Embeddings, encode_images, encode_shard


def encode_all(backbone, images, out, count, **options):
    for index in range(count):
        encode_shard(backbone, images, out, (index, count), **options)


@pytest.mark.parametrize("count", [1, 4, 40])  # 40: more parts than pictures
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
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "pictures") == [
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


def test_unreadable_pictures_are_listed(backbone, paths, tmp_path):
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
    for model, images in [(other_backbone, paths), (backbone, paths[1:])]:
        with pytest.raises(ArtifactError, match="other pictures or by another model"):
            encode_shard(model, images, tmp_path, (0, 2))
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
    with pytest.raises(ClipadaptError, match="one value a picture"):
        encode_shard(backbone, paths, tmp_path, columns=columns)


def test_the_matrix_is_mapped_not_read(backbone, tmp_path):
    pictures = np.zeros((3, 5, 5, 3), np.uint8)
    encode_all(backbone, pictures, tmp_path, 2)
    found = Embeddings(tmp_path)
    assert str(tmp_path / "part-00001-of-00002.npy") in Path("/proc/self/maps").read_text()
    assert sum(len(part) for part in found.parts) == 3
