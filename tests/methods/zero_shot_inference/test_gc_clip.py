"""GC-CLIP: crops by a plain computation, limits, the forms of images, and its gain where objects are small."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import clipadapt
from clipadapt.backbones import Backbone, load_backbone
from clipadapt.data.playground.drawing import TRAIN_KINDS, TRAIN_STYLES, Playground
from clipadapt.errors import ArtifactError, BackboneError, ClipadaptError, DataError
from clipadapt.methods import create
from clipadapt.methods.zero_shot_inference.gc_clip import boxes_of, reclassified, squared, widened
from tests.tiny import tiny_clip

NAMES = ["cat", "dog", "house", "star", "circle", "red cat"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(tiny_clip())


def random_image(seed: int = 0, width: int = 70, height: int = 50) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 5, width // 5, 3))
    return Image.fromarray(values.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)


def corner(image, names):
    """A detector that always sees the same place."""
    return [[10, 5, 30, 15], [0, 0, 50, 50]], [0.9, 0.3], [1, 0]


def test_squares_and_margins():
    assert squared((10, 5, 30, 15), 70, 50) == (10, 0, 30, 20)
    assert squared((60, 40, 70, 42), 70, 50) == (60, 36, 70, 46)
    assert squared((60, 47, 70, 50), 70, 50) == (60, 40, 70, 50), "moved where the image ends"
    assert squared((0, 10, 70, 20), 70, 50) == (0, 0, 70, 50), "cut where the image is too small"
    assert widened((10, 0, 30, 20), 0.0, 70, 50) == (10, 0, 30, 20)
    assert widened((10, 0, 30, 20), 0.5, 70, 50) == (5, 0, 50, 35)
    assert widened((10, 0, 30, 20), 1.0, 70, 50) == (0, 0, 70, 50)
    assert widened((69.9, 49.9, 70, 50), 0.0, 70, 50) == (69, 49, 70, 50)


def test_reclassified_keeps_the_others_behind():
    whole = torch.tensor([[5.0, 4, 3, 2, 1], [5, 4, 3, 2, 1]])
    shortlist = torch.tensor([[0, 1], [0, 1]])
    out = reclassified(whole, torch.tensor([[2.0, 9], [7, 6]]), shortlist)
    assert out.tolist() == [[2, 9, 1, 0, -1], [7, 6, 3, 2, 1]]
    every = torch.arange(5).expand(2, 5)
    assert torch.equal(reclassified(whole, whole.flip(1), every), whole.flip(1))


@torch.no_grad()
def test_the_plain_computation(backbone):
    """Image by image and crop by crop."""
    images = [random_image(seed) for seed in range(3)]
    model = create("gc-clip", detector=corner, k=3, crops=3, margin=0.4).fit(backbone, class_names=NAMES)
    found = model.image_logits(images)[0]
    texts = backbone.encode_texts([f"a photo of a {name}." for name in NAMES])
    scale = backbone.logit_scale
    for image, row in zip(images, found, strict=True):
        whole = scale * backbone.encode_images(backbone.preprocess(image)[None])[0] @ texts.T
        best = whole.argsort(descending=True)[:3]
        total = torch.zeros(16)
        for margin in (0.0, 0.2, 0.4):
            left, top, right, bottom = 10, 0, 30, 20  # the box made square
            box = (left - margin * left, top - margin * top, right + margin * (70 - right), bottom + margin * 30)
            box = (*np.floor(box[:2]).astype(int).tolist(), *np.ceil(box[2:]).astype(int).tolist())
            total += backbone.encode_images(backbone.preprocess(image.crop(box))[None])[0]
        new = scale * texts[best] @ (total / total.norm())
        torch.testing.assert_close(row[best], new, atol=1e-4, rtol=0)
        rest = [c for c in range(6) if c not in best]
        assert row[rest].max() <= new.min() + 1e-4
        order = whole[rest].argsort()
        assert torch.equal(row[rest].argsort(), order)
        torch.testing.assert_close(row[rest][order].diff(), whole[rest][order].diff(), atol=1e-4, rtol=0)


def test_limits(backbone):
    """The whole image as the crop is plain CLIP; so is a shortlist of one; so is a detector that finds nothing."""
    images = [random_image(seed) for seed in range(4)]
    plain = create("zero-shot").fit(backbone, class_names=NAMES)
    expected = plain.image_logits(images)[0]
    for settings in (
        {"margin": 1.0, "crops": 1, "detector": corner},
        {"detector": lambda *_: ([], [], [])},
    ):
        model = create("gc-clip", **settings).fit(backbone, class_names=NAMES)
        torch.testing.assert_close(model.image_logits(images)[0], expected, atol=1e-4, rtol=0)
    one = create("gc-clip", k=1, detector=lambda *_: ([[10, 5, 30, 15]], [1.0], [0])).fit(backbone, class_names=NAMES)
    np.testing.assert_array_equal(one.predict(images), plain.predict(images))
    every = create("gc-clip", k=99).fit(backbone, class_names=NAMES).image_logits(images)[0]
    assert every.isfinite().all()


def test_the_detector_sees_the_shortlist_likeliest_first(backbone):
    asked = []

    def spy(image, names):
        asked.append(list(names))
        return corner(image, names)

    image = random_image(3)
    create("gc-clip", detector=spy, k=4).fit(backbone, class_names=NAMES).predict([image])
    logits = create("zero-shot").fit(backbone, class_names=NAMES).image_logits([image])[0][0]
    assert asked == [[NAMES[c] for c in logits.argsort(descending=True)[:4]]]


def test_every_image_is_encoded_once_and_every_crop_once(backbone, monkeypatch):
    seen = []
    encode = backbone.encode_images
    monkeypatch.setattr(backbone, "encode_images", lambda pixels, **k: seen.append(len(pixels)) or encode(pixels, **k))
    create("gc-clip", detector=corner, crops=3).fit(backbone, class_names=NAMES).predict(
        [random_image(i) for i in range(5)]
    )
    assert seen == [5, 15]


def test_forms_of_images(backbone, tmp_path):
    """Pixels have their crops taken from what they show; what cannot be read is skipped when asked."""
    images = [random_image(seed, 32, 32) for seed in range(3)]
    model = create("gc-clip", detector=corner).fit(backbone, class_names=NAMES)
    expected = model.image_logits(images)[0]
    pixels = torch.stack([backbone.preprocess(image) for image in images])
    logits, kept = model.image_logits(pixels)
    torch.testing.assert_close(logits, expected)
    assert kept == [0, 1, 2]
    images[0].save(path := tmp_path / "a.png")
    (broken := tmp_path / "b.png").write_bytes(b"no image")
    logits, kept = model.image_logits([path, broken, images[2]], on_error="skip")
    torch.testing.assert_close(logits, expected[[0, 2]])
    assert kept == [0, 2]
    with pytest.raises(DataError, match=r"b\.png"):
        model.predict([path, broken])
    with pytest.raises(ClipadaptError, match="on_error"):
        model.image_logits([path], on_error="ignore")
    with pytest.raises(ClipadaptError, match=r"\(N, 3, H, W\)"):
        model.predict(pixels[0])
    assert model.image_logits(pixels[:0])[0].shape == (0, 6)


@pytest.mark.parametrize("view", ["guided", "centre", "random"])
def test_views_are_deterministic_and_differ(backbone, view):
    images = [random_image(seed) for seed in range(40)]  # more than one block
    model = create("gc-clip", view=view).fit(backbone, class_names=NAMES)
    first = model.image_logits(images)[0]
    torch.testing.assert_close(model.image_logits(images[::-1])[0].flip(0), first, atol=1e-4, rtol=0)
    other = create("gc-clip", view="random", seed=2).fit(backbone, class_names=NAMES).image_logits(images)[0]
    assert not torch.allclose(first, other, atol=1e-2)
    for box in boxes_of(model, images[0], NAMES):
        assert 0 <= box[0] < box[2] <= 70
        assert 0 <= box[1] < box[3] <= 50


def test_saving_names_the_detector(backbone, tmp_path):
    model = create("gc-clip", detector=corner).fit(backbone, class_names=NAMES)
    with pytest.raises(ArtifactError, match="detector is a function"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model" / "config.json").exists()
    model = create("gc-clip").fit(backbone, class_names=NAMES)
    loaded = clipadapt.load(model.save(tmp_path / "model"), backbone)
    torch.testing.assert_close(loaded.image_logits([random_image()])[0], model.image_logits([random_image()])[0])


def test_bad_input(backbone, monkeypatch):
    with pytest.raises(ClipadaptError, match="callable"):
        create("gc-clip", detector=3).fit(backbone, class_names=NAMES)
    missing = create("gc-clip", detector="no/such-detector/anywhere").fit(backbone, class_names=NAMES)
    with pytest.raises(BackboneError, match="no/such-detector"):
        missing.predict([random_image()])
    with pytest.raises(ClipadaptError, match="not at features"):
        create("gc-clip").fit(backbone, class_names=NAMES).logits(np.eye(16))
    monkeypatch.setattr(Backbone, "capabilities", property(lambda self: frozenset({"texts"})))
    with pytest.raises(ClipadaptError, match="Saliency needs attention, patches"):
        create("gc-clip").fit(backbone, class_names=NAMES)


@pytest.mark.claim("gc-clip", "things of a 20th of the image: above the whole image, and above crops of its centre")
def test_it_helps_where_objects_are_small(claim):
    """Zero-shot kinds of the playground: better than the whole image and centre crops on objects of a 20th of it."""
    backbone, kinds = load_backbone(), TRAIN_KINDS[:20]
    worlds = [Playground(size=128, kinds=kinds, styles=TRAIN_STYLES, seed=seed) for seed in (3, 4, 5)]
    images = [world.scene(i, kind=kinds[i], count="one").image for world in worlds for i in range(20)]
    labels = np.tile(np.arange(20), 3)
    accuracy = {
        name: (method.fit(backbone, class_names=list(kinds)).predict(images) == labels).reshape(3, -1).mean(1)
        for name, method in {
            "gc-clip": create("gc-clip"),
            "whole image": create("zero-shot"),
            "centre": create("gc-clip", view="centre"),
        }.items()
    }
    claim(accuracy)
    assert accuracy["gc-clip"].mean() > accuracy["whole image"].mean() + 0.03
    assert accuracy["gc-clip"].mean() > accuracy["centre"].mean() + 0.03
