"""Encoding: the right features in the right order, nothing computed twice, every failure accounted for."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipadapt.backbones import load_backbone
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.features import encode_images
from clipadapt.features.views import RandomView
from tests.tiny import tiny_clip


def plain(backbone, paths):
    with torch.no_grad():
        return backbone.encode_images(torch.stack([backbone.preprocess(Image.open(path)) for path in paths]))


def test_features_are_the_models_own_in_the_order_given(backbone, paths):
    encoded = encode_images(backbone, paths, batch_size=7)
    assert encoded.features.dtype == torch.float32
    assert encoded.kept == list(range(30))
    assert encoded.skipped == []
    torch.testing.assert_close(encoded.features, plain(backbone, paths))


def test_a_real_backbone_and_its_changed_weights(paths):
    backbone = load_backbone(tiny_clip())
    before = encode_images(backbone, paths).features
    torch.testing.assert_close(before, plain(backbone, paths))
    backbone.model.visual_projection.weight.data.mul_(-1)
    torch.testing.assert_close(encode_images(backbone, paths).features, -before)


def test_second_run_neither_decodes_nor_computes(backbone, paths):
    first = encode_images(backbone, paths)
    assert (backbone.seen, backbone.preprocessed) == (30, 30)
    second = encode_images(backbone, paths[::-1])
    assert (backbone.seen, backbone.preprocessed) == (30, 30)
    assert torch.equal(second.features, first.features.flip(0))


def test_only_new_images_are_encoded(backbone, paths):
    encode_images(backbone, paths[:20])
    encoded = encode_images(backbone, paths)
    assert backbone.seen == 30
    torch.testing.assert_close(encoded.features, plain(backbone, paths))


def test_copies_are_encoded_once(backbone, paths, tmp_path):
    copy = shutil.copy(paths[3], tmp_path / "copy.png")
    listed = [paths[3], paths[0], copy, paths[0], paths[1]]
    encoded = encode_images(backbone, listed, cache=False)
    assert backbone.seen == 3
    torch.testing.assert_close(encoded.features, plain(backbone, listed))


def test_a_image_is_known_by_its_content_not_by_its_place(backbone, paths, tmp_path):
    before = encode_images(backbone, paths[:1]).features
    moved = shutil.move(paths[0], tmp_path / "elsewhere.png")
    assert torch.equal(encode_images(backbone, [moved]).features, before)
    assert backbone.seen == 1


def test_an_edit_is_seen_although_path_size_and_time_stay(backbone, tmp_path):
    path = tmp_path / "edited.bmp"  # uncompressed: any content has the same size
    for colour in ("red", "blue"):
        Image.new("RGB", (9, 9), colour).save(path)
        os.utime(path, (1, 1))
        encoded = encode_images(backbone, [path])
        torch.testing.assert_close(encoded.features, plain(backbone, [path]))


def test_backbones_do_not_share_features(backbone, other_backbone, paths):
    encode_images(backbone, paths)
    encoded = encode_images(other_backbone, paths)
    torch.testing.assert_close(encoded.features, plain(other_backbone, paths))


def test_images_in_memory(backbone):
    arrays = np.random.default_rng(0).integers(0, 256, (5, 21, 17, 3), np.uint8)
    images = [Image.fromarray(array) for array in arrays]
    encoded = encode_images(backbone, images)
    torch.testing.assert_close(encoded.features, backbone.plain(images))
    assert torch.equal(encode_images(backbone, arrays).features, encoded.features)


def test_pixels_are_encoded_as_they_are(backbone):
    pixels = torch.rand(5, 3, 16, 12)
    encoded = encode_images(backbone, pixels, batch_size=2)
    torch.testing.assert_close(encoded.features, backbone.encode_images(pixels))
    assert encoded.kept == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("images", [[], torch.empty(0, 3, 16, 12)])
def test_nothing_to_encode(backbone, images):
    encoded = encode_images(backbone, images)
    assert encoded.features.shape == (0, 8)
    assert encoded.kept == []


def test_nothing_to_encode_in_views(backbone):
    assert encode_images(backbone, [], views=3).features.shape == (0, 3, 8)


def test_cache_can_be_elsewhere_or_off(backbone, paths, tmp_path):
    encode_images(backbone, paths, cache=False)
    assert list(Path(os.environ["CLIPADAPT_CACHE"]).rglob("*.safetensors")) == []
    encode_images(backbone, paths, cache=tmp_path / "mine")
    assert len(list((tmp_path / "mine").rglob("*.safetensors"))) == 1
    assert list(Path(os.environ["CLIPADAPT_CACHE"]).rglob("*.safetensors")) == []


@pytest.fixture
def with_bad_ones(paths, tmp_path):
    empty, cut = tmp_path / "empty.jpg", tmp_path / "cut.png"
    empty.touch()
    cut.write_bytes(Path(paths[0]).read_bytes()[:200])
    return [*paths[:6], str(empty), *paths[6:8], str(cut), str(cut), str(tmp_path / "absent.jpg"), *paths[8:10]]


def test_an_unreadable_image_is_named_and_the_work_before_it_kept(backbone, paths, with_bad_ones):
    with pytest.raises(DataError, match=r"empty\.jpg"):
        encode_images(backbone, with_bad_ones, batch_size=2)
    assert backbone.seen == 6
    encode_images(backbone, paths[:6])
    assert backbone.seen == 6


def test_unreadable_images_are_skipped_when_asked(backbone, paths, with_bad_ones):
    for _ in range(2):
        encoded = encode_images(backbone, with_bad_ones, on_error="skip", batch_size=4)
        assert encoded.kept == [0, 1, 2, 3, 4, 5, 7, 8, 12, 13]
        assert [Path(name).name for name, _ in encoded.skipped] == ["empty.jpg", "cut.png", "cut.png", "absent.jpg"]
        assert all(name in reason for name, reason in encoded.skipped)
        torch.testing.assert_close(encoded.features, plain(backbone, paths[:10]))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"on_error": "skp"}, "did you mean 'skip'"), ({"precision": "float8"}, "float16"), ({"batch_size": 0}, "1")],
)
def test_options_out_of_range(backbone, paths, options, message):
    with pytest.raises(ClipadaptError, match=message):
        encode_images(backbone, paths, **options)


def test_decoding_runs_beside_the_model_within_bounds(backbone, paths):
    ahead = []
    encode = backbone.encode_images

    def watched(pixels):
        ahead.append(backbone.preprocessed - backbone.seen)
        return encode(pixels)

    backbone.encode_images = watched
    encode_images(backbone, paths, batch_size=2, workers=2)
    assert all(name.startswith("decode") for name in backbone.threads)
    assert backbone.batch_sizes == [2] * 15
    assert max(ahead) <= 2 + 2 * 2 + 1  # the batch, two batches in flight, one just taken


def test_autocast_of_the_caller_does_not_reach_the_cache(backbone, paths):
    with torch.autocast("cpu", torch.bfloat16):
        encoded = encode_images(backbone, paths)
    torch.testing.assert_close(encoded.features, plain(backbone, paths))


def test_half_precision_is_a_rounding_that_lasts(backbone, paths):
    half = encode_images(backbone, paths, precision="float16").features
    assert torch.equal(half, half.half().float())
    assert torch.equal(encode_images(backbone, paths, precision="float16").features, half)
    exact = encode_images(backbone, paths).features
    assert not torch.equal(exact, half)
    torch.testing.assert_close(exact, half, atol=1e-3, rtol=0)


def test_features_can_be_trained_on(backbone, paths):
    weight = torch.zeros(8, 8, requires_grad=True)
    (encode_images(backbone, paths).features @ weight).sum().backward()
    assert weight.grad is not None


def test_views_depend_on_content_and_seed_alone(backbone, paths):
    views = encode_images(backbone, paths, views=3, cache=False).features
    assert views.shape == (30, 3, 8)
    reordered = encode_images(backbone, paths[::-1], views=3, batch_size=5, cache=False).features
    torch.testing.assert_close(reordered, views.flip(0))
    other_seed = encode_images(backbone, paths, views=3, seed=2, cache=False).features
    image = encode_images(backbone, paths, cache=False).features[:, None]
    for different in (other_seed, image, views.roll(1, dims=1)):
        assert torch.isclose(different, views).all(-1).float().mean() < 0.05  # a crop may be the whole image


def test_more_views_reuse_those_that_are_kept(backbone, paths):
    two = encode_images(backbone, paths, views=2).features
    five = encode_images(backbone, paths, views=5, batch_size=8).features
    assert backbone.seen == 30 * 5
    assert torch.equal(five[:, :2], two)
    encode_images(backbone, paths, views=5)
    assert backbone.seen == 30 * 5


def test_crops_stay_inside_and_show_what_was_asked():
    image = Image.new("L", (90, 50))
    crops = [RandomView(n, 1, 0.25)._crop(image, random.Random(n)) for n in range(200)]
    for left, top, right, bottom in crops:
        assert 0 <= left < right <= 90
        assert 0 <= top < bottom <= 50
        assert (right - left) * (bottom - top) >= 0.2 * 90 * 50
    assert len(set(crops)) > 150


def test_half_of_the_views_are_flipped():
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")  # brightness grows from one side to the other
    views = [np.asarray(RandomView(n, 1, 0.5).of(ramp, "ramp", (16, 16)), float).mean((0, 2)) for n in range(200)]
    rising = sum(view[-1] > view[0] for view in views)
    assert 70 < rising < 130


def test_progress_is_shown_on_terminals_only(backbone, paths, capsys, monkeypatch):
    encode_images(backbone, paths[:10], progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    encode_images(backbone, paths, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Encoding images" in err
    assert "30/30" in err
    assert "/s" in err
    encode_images(backbone, paths, progress=False)
    assert capsys.readouterr() == ("", "")
