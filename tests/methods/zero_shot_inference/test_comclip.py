"""ComCLIP: the parser, sub-images, the score by a plain computation, savings, and swapped captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import clipadapt
from clipadapt.backbones import Backbone, load_backbone
from clipadapt.data.caption_parts import Parts, parse
from clipadapt.data.playground.drawing import TRAIN_KINDS, Playground
from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.methods import create
from clipadapt.methods.zero_shot_inference.comclip import parsed, part_of, regions, shares
from tests.tiny import tiny_clip

CAPTIONS = ["a red cat to the left of a dog", "a dog to the left of a red cat", "a red cat and a star", "a house"]
BOXES = {"red cat": (2, 3, 20, 21), "dog": (30, 10, 50, 39), "star": (0, 30, 9, 40)}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(tiny_clip())


def random_image(seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (8, 12, 3))
    return Image.fromarray(values.astype(np.uint8)).resize((60, 40), Image.Resampling.NEAREST)


def known(image, names):
    found = [i for i, name in enumerate(names) if name in BOXES]
    return [BOXES[names[i]] for i in found], [1.0] * len(found), found


@pytest.mark.parametrize(
    ("caption", "parts"),
    [
        ("a red circle to the left of a blue square", ("red circle", "to the left of", "blue square")),
        ("A young man riding a brown horse in a field.", ("young man", "riding", "brown horse")),
        ("two dogs are playing with a ball", ("two dogs", "are playing with", "ball")),
        ("a person sits on the boat", ("person", "sits on", "boat")),
        ("the star is inside the circle", ("star", "is inside", "circle")),
        ("a cat in front of the house, at night", ("cat", "in front of", "house")),
        ("bird flying over water", ("bird", "flying over", "water")),
        ("a tall building next to a ring", ("tall building", "next to", "ring")),
        ("a photo of a red ring above a key", ("red ring", "above", "key")),
        ("a red star and a blue dog", ("red star", None, "blue dog")),
        ("a green apple, a red pear", ("green apple", None, "red pear")),
    ],
)
def test_captions_with_structure(caption, parts):
    assert parse(caption) == Parts(*parts)


@pytest.mark.parametrize(
    "caption",
    ["", "cat", "a photo of a cat.", "a small striped dog", "swimming pool", "to the left of", "a cat on", "and"],
)
def test_captions_without(caption):
    assert parse(caption) is None


def test_playground_captions_parse_into_their_things():
    """Every caption of a scene with two things, as written there."""
    world = Playground(kinds=TRAIN_KINDS, seed=5)
    for i in range(40):
        scene = world.scene(i, relation=("left of", "right of", "above", "below")[i % 4])
        things = {name for o in scene.objects for name in (o.kind, f"{o.colour} {o.kind}")}
        for caption in scene.captions:
            parts = parse(caption)
            assert parts is not None
            assert {parts.subject, parts.object} <= things
            assert (parts.predicate is None) == (" and " in caption)


def test_weights():
    similar = torch.tensor([0.3, 0.1, -0.2])
    assert shares(similar, "sum", 10.0).tolist() == pytest.approx([0.75, 0.25, 0])
    assert shares(similar, "equal", 10.0).tolist() == pytest.approx([1 / 3] * 3)
    torch.testing.assert_close(shares(similar, "softmax", 10.0), torch.softmax(10 * similar, 0))
    assert shares(-similar.abs(), "sum", 10.0).tolist() == pytest.approx([1 / 3] * 3)


def test_subimages():
    image = random_image()
    values = np.asarray(image)
    masked = np.asarray(part_of(image, ((2, 3, 20, 21), (30, 10, 50, 39)), "mask"))
    inside = np.zeros((40, 60), bool)
    inside[3:21, 2:20] = inside[10:39, 30:50] = True
    assert (masked[inside] == values[inside]).all()
    assert (masked[~inside] == 0).all()
    crop = np.asarray(part_of(image, ((2, 3, 20, 21), (30, 10, 50, 39)), "crop"))
    assert (crop == values[3:39, 2:50]).all()
    assert part_of(image, (), "mask") is image


@torch.no_grad()
@pytest.mark.parametrize("subpicture", ["mask", "crop"])
@pytest.mark.parametrize("weights", ["sum", "equal"])
def test_the_plain_computation(backbone, subpicture, weights):
    """Caption by caption, as the official script goes: parts, their similarities over the sum, added, cosine."""
    model = create("comclip", detector=known, subpicture=subpicture, weights=weights)
    model.fit(backbone, class_names=CAPTIONS)
    images = [random_image(seed) for seed in range(3)]
    found = model.image_logits(images)[0]

    def see(image):
        return backbone.encode_images(backbone.preprocess(image)[None])[0]

    def sub(image, *boxes):
        if subpicture == "crop":
            low, high = np.min(boxes, 0), np.max(boxes, 0)
            return see(image.crop((*low[:2].tolist(), *high[2:].tolist())))
        values, out = np.asarray(image), np.zeros((40, 60, 3), np.uint8)
        for left, top, right, bottom in boxes:
            out[top:bottom, left:right] = values[top:bottom, left:right]
        return see(Image.fromarray(out))

    for image, row in zip(images, found, strict=True):
        cat, dog, star = (sub(image, BOXES[name]) for name in ("red cat", "dog", "star"))
        both = sub(image, BOXES["red cat"], BOXES["dog"])
        expected = []
        for caption, parts in zip(
            CAPTIONS,
            (
                {"red cat": cat, "to the left of": both, "dog": dog},
                {"dog": dog, "to the left of": both, "red cat": cat},
                {"red cat": cat, "star": star},
                {},
            ),
            strict=True,
        ):
            feature = see(image)
            if parts:
                words = backbone.encode_texts(list(parts))
                similar = [
                    max(float(w @ z), 0) if weights == "sum" else 1 for w, z in zip(words, parts.values(), strict=True)
                ]
                similar = similar if sum(similar) else [1] * len(parts)
                feature = feature + sum(s / sum(similar) * z for s, z in zip(similar, parts.values(), strict=True))
            text = backbone.encode_texts([caption])[0]
            expected.append(backbone.logit_scale * float(feature @ text / feature.norm()))
        np.testing.assert_allclose(row, expected, atol=1e-3)


def test_what_is_not_found_has_the_whole_random_image(backbone):
    image = random_image()
    plain = create("zero-shot", templates="{}").fit(backbone, class_names=CAPTIONS).image_logits([image])[0]
    blind = create("comclip", detector=lambda *_: ([], [], [])).fit(backbone, class_names=CAPTIONS)
    torch.testing.assert_close(blind.image_logits([image])[0], plain, atol=1e-4, rtol=0)
    parts = regions(parse("a dog above a house"), {"dog": ((1, 2, 3, 4),), "house": ()})
    assert parts == [("dog", ((1, 2, 3, 4),)), ("house", ()), ("above", ())]
    assert regions(parse("a dog"), {}) == []


def test_captions_without_structure_are_plain_clip(backbone):
    names = ["a cat", "dog", "red star"]
    seen = []
    model = create("comclip", detector=lambda *a: seen.append(a)).fit(backbone, class_names=names)
    plain = create("zero-shot", templates="{}").fit(backbone, class_names=names)
    images = [random_image(seed) for seed in range(3)]
    torch.testing.assert_close(model.image_logits(images)[0], plain.image_logits(images)[0], atol=1e-4, rtol=0)
    assert not seen, "nothing to be looked for"
    mixed = create("comclip", detector=known).fit(backbone, class_names=[*CAPTIONS, "dog"])
    torch.testing.assert_close(
        mixed.image_logits(images)[0][:, 4], plain.image_logits(images)[0][:, 1], atol=1e-4, rtol=0
    )


def test_what_captions_share_is_looked_for_and_encoded_once(backbone, monkeypatch):
    asked, sizes = [], []
    encode = backbone.encode_images

    def spy(image, names):
        asked.append(list(names))
        return known(image, names)

    model = create("comclip", detector=spy).fit(backbone, class_names=CAPTIONS)
    monkeypatch.setattr(backbone, "encode_images", lambda pixels, **k: sizes.append(len(pixels)) or encode(pixels, **k))
    model.predict([random_image(0), random_image(1)])
    assert asked == [["dog", "red cat", "star"]] * 2
    assert sizes == [2, 4, 4], "the images; then cat, dog, star, and cat with dog once for both captions"


def test_parsers_of_the_callers_own(backbone):
    def halves(caption):
        left, middle, right = caption.partition(" ! ")
        return (left, middle and None, right) if right else None

    assert [parsed(halves, caption) for caption in ("dog ! star", "dog and star")] == [Parts("dog", None, "star"), None]
    asked = []
    model = create("comclip", parser=halves, detector=lambda _, names: (asked.extend(names), known(_, names))[1])
    model.fit(backbone, class_names=["dog ! star", "a dog"]).predict([random_image()])
    assert asked == ["dog", "star"]
    for answer in (("dog",), ("dog", None, ""), ("", "on", "star"), (1, None, "star")):
        with pytest.raises(ClipadaptError, match="the parser must give"):
            create("comclip", parser=lambda _, answer=answer: answer).fit(backbone, class_names=CAPTIONS)
    with pytest.raises(ClipadaptError, match="neither"):
        create("comclip", parser="spacy").fit(backbone, class_names=CAPTIONS)


def test_saved_and_for_new_captions(backbone, tmp_path):
    model = create("comclip").fit(backbone, class_names=CAPTIONS)
    image = random_image()
    loaded = clipadapt.load(model.save(tmp_path / "model"), backbone)
    torch.testing.assert_close(loaded.image_logits([image])[0], model.image_logits([image])[0])
    other = model.with_classes(["a star above a dog", "a cat"])
    fresh = create("comclip").fit(backbone, class_names=["a star above a dog", "a cat"])
    torch.testing.assert_close(other.image_logits([image])[0], fresh.image_logits([image])[0])
    with pytest.raises(ArtifactError, match="parser is a function"):
        create("comclip", parser=parse).fit(backbone, class_names=CAPTIONS).save(tmp_path / "other")
