"""Shards: any number of processes give what one would, and an incomplete set is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.features import encode_images, encode_shard, merge


def encode_all(backbone, images, out, count, **options):
    for index in range(count):
        encode_shard(backbone, images, out, (index, count), **options)


@pytest.mark.parametrize("count", [1, 4, 40])  # 40: more shards than pictures
def test_shards_make_up_the_whole(backbone, paths, tmp_path, count):
    encode_all(backbone, paths, tmp_path / "out", count, batch_size=4)
    merged = merge(tmp_path / "out")
    torch.testing.assert_close(merged.features, encode_images(backbone, paths).features)
    assert merged.names == paths
    assert merged.fingerprint == backbone.fingerprint
    assert torch.equal(load_file(tmp_path / "out" / "features.safetensors")["features"], merged.features)
    assert json.loads((tmp_path / "out" / "features.json").read_text())["names"] == paths


def test_options_reach_the_shards(backbone, paths, tmp_path):
    encode_all(backbone, paths, tmp_path, 3, views=2, precision="float16")
    merged = merge(tmp_path)
    assert merged.features.dtype == torch.float16
    expected = encode_images(backbone, paths, views=2, precision="float16").features
    torch.testing.assert_close(merged.features.float(), expected, atol=1e-3, rtol=0)


def test_a_shard_that_is_done_is_not_done_again(backbone, paths, tmp_path):
    first = encode_shard(backbone, paths, tmp_path, (1, 3))
    done = backbone.seen
    assert encode_shard(backbone, paths, tmp_path, (1, 3), seed=1) == first
    assert backbone.seen == done == 10
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "shard"))) == [
        "shard-00001-of-00003.json",
        "shard-00001-of-00003.safetensors",
    ]


def test_an_interrupted_shard_continues(backbone, paths, tmp_path):
    encode = backbone.encode_images

    def interrupted(pixels):
        if backbone.seen >= 20:
            raise KeyboardInterrupt
        return encode(pixels)

    backbone.encode_images = interrupted
    with pytest.raises(KeyboardInterrupt):
        encode_shard(backbone, paths, tmp_path / "out", (0, 1), batch_size=5)
    backbone.encode_images = encode
    encode_shard(backbone, paths, tmp_path / "out", (0, 1), batch_size=5)
    assert backbone.seen == 30


def test_missing_shards_are_named(backbone, paths, tmp_path):
    with pytest.raises(ArtifactError, match="no finished shard"):
        merge(tmp_path)
    for index in (0, 2, 4):
        encode_shard(backbone, paths, tmp_path, (index, 5))
    with pytest.raises(ArtifactError, match=r"shard 1, 3 of 5 "):
        merge(tmp_path)


def test_unreadable_pictures_are_listed(backbone, paths, tmp_path):
    bad = tmp_path / "bad.png"
    bad.touch()
    listed = [*paths[:4], str(bad), *paths[4:8]]
    encode_all(backbone, listed, tmp_path / "out", 3, on_error="skip")
    merged = merge(tmp_path / "out")
    assert merged.names == paths[:8]
    assert [name for name, _ in merged.skipped] == [str(bad)]
    torch.testing.assert_close(merged.features, encode_images(backbone, paths[:8]).features)


def test_shards_of_different_work_do_not_mix(backbone, other_backbone, paths, tmp_path):
    encode_shard(backbone, paths, tmp_path, (0, 2))
    for work in [(other_backbone, paths, {}), (backbone, paths[1:], {}), (backbone, paths, {"views": 2})]:
        model, images, options = work
        with pytest.raises(ArtifactError, match="other pictures, another backbone or other options"):
            encode_shard(model, images, tmp_path, (0, 2), **options)
    encode_shard(other_backbone, paths, tmp_path, (1, 2))
    with pytest.raises(ArtifactError, match="differ in their fingerprint"):
        merge(tmp_path)


def test_damage_is_found(backbone, paths, tmp_path):
    encode_all(backbone, paths, tmp_path, 3)
    file = tmp_path / "shard-00001-of-00003.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1], b""):
        file.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"00001-of-00003|Shard 1 "):
            merge(tmp_path)
        assert not (tmp_path / "features.safetensors").exists()
    file.unlink()
    with pytest.raises(ArtifactError, match="missing or damaged"):
        merge(tmp_path)
    (tmp_path / "shard-00001-of-00003.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"00001-of-00003\.json is damaged"):
        merge(tmp_path)


@pytest.mark.parametrize("shard", [(3, 3), (-1, 3), (0, 0)])
def test_shard_numbers_out_of_range(backbone, paths, tmp_path, shard):
    with pytest.raises(ClipadaptError, match="numbered from 0"):
        encode_shard(backbone, paths, tmp_path, shard)


def test_merged_features_are_mapped_not_read(backbone, tmp_path):
    pictures = np.zeros((3, 5, 5, 3), np.uint8)
    encode_all(backbone, pictures, tmp_path, 2)
    merged = merge(tmp_path)
    assert str(tmp_path / "features.safetensors") in Path("/proc/self/maps").read_text()
    assert merged.features.shape == (3, 8)
