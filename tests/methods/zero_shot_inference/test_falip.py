"""FALIP: figures of the official mask, the tower computed by hand, limits, and regions told apart."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.data.playground.drawing import TRAIN_KINDS, TRAIN_STYLES, Playground
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from clipadapt.methods.zero_shot_inference.falip import as_boxes, encode_regions, foveal_mask, on_pixels, score_regions
from tests.tiny import tiny_clip, tiny_siglip

NAMES = ["cat", "dog", "house", "star"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(tiny_clip())


def random_image(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8))


def slow_mask(box, rows, columns, patch, strength, sigma):
    """One box, cell by cell."""
    out = np.zeros((rows, columns))
    cells = [(y, x) for y in range(rows) for x in range(columns)
             if max(np.ceil(box[1] / patch), 1) - 1 <= y <= max(np.ceil(box[3] / patch), 1) - 1
             and max(np.ceil(box[0] / patch), 1) - 1 <= x <= max(np.ceil(box[2] / patch), 1) - 1]  # fmt: skip
    middle = np.mean(cells, axis=0)
    heights = [np.exp(-0.5 * ((y - middle[0]) ** 2 + (x - middle[1]) ** 2) / sigma**2) for y, x in cells]
    for (y, x), height in zip(cells, heights, strict=True):
        out[y, x] = strength * (height - min(heights) + 1e-6) / (max(heights) - min(heights) + 1e-6)
    return out


# What `transform_box2token_base` of the official repository puts into row 0 of its 197 x 197 mask for an image of
# 224 px in patches of 16: the mask's sum, and row 3 of the grid from column 1 on. It is computed in float32.
OFFICIAL = [
    ((30, 40, 120, 90), 3.05899, [0.03665, 0.12739, 0.18184, 0.2, 0.18184, 0.12739, 0.03665, 0]),
    ((0, 0, 224, 224), 24.25541, [0.09992, 0.12373, 0.14278, 0.15708, 0.16661, 0.17138, 0.17138, 0.16661]),
    ((100.5, 16, 101, 200), 1.58923, [0, 0, 0, 0, 0, 0.15, 0, 0]),
    ((16, 32, 48, 64), 0.61216, [0.10104, 0.00198, 0, 0, 0, 0, 0, 0]),
]


@pytest.mark.parametrize(("box", "total", "row"), OFFICIAL)
def test_official_masks(box, total, row):
    mask = foveal_mask(torch.tensor([box]), (14, 14), 16, strength=0.2, sigma=100.0)[0]
    assert float(mask.sum()) == pytest.approx(total, rel=3e-3)
    np.testing.assert_allclose(mask.view(14, 14)[3, 1:9], row, atol=3e-4)


@pytest.mark.parametrize("sigma", [0.8, 3.0, 100.0])
def test_mask_cell_by_cell(sigma):
    boxes = torch.tensor([[3.0, 5, 20, 40], [8, 8, 16, 16], [0, 0, 47.5, 1], [40, 30, 48, 40]])
    masks = foveal_mask(boxes, (5, 6), 8, strength=1.5, sigma=sigma).view(-1, 5, 6)
    for mask, box in zip(masks, boxes.tolist(), strict=True):
        np.testing.assert_allclose(mask, slow_mask(box, 5, 6, 8, 1.5, sigma), atol=1e-5)
        assert float(mask.max()) == pytest.approx(1.5, abs=1e-5)


def test_a_box_that_the_transform_cuts_off_is_no_region(backbone):
    wide = on_pixels(torch.tensor([[0.0, 0, 20, 40], [0, 0, 60, 40]]), (120, 40), backbone.preprocess)
    masks = foveal_mask(wide, (4, 4), 8, strength=1.0, sigma=2.0)
    assert (masks[0] == 0).all()
    assert (masks[1] > 0).any()


def test_boxes_follow_the_images_transform(backbone):
    """A rectangle drawn into images of several shapes is found where its box is put."""
    for size in ((32, 32), (64, 64), (96, 48), (40, 120)):
        image = Image.new("RGB", size)
        box = [0.4 * size[0], 0.45 * size[1], 0.6 * size[0], 0.55 * size[1]]
        ImageDraw.Draw(image).rectangle([round(v) for v in box[:2]] + [round(v) - 1 for v in box[2:]], fill="white")
        light = backbone.preprocess(image)[0] > 0  # (H, W)
        rows, columns = light.any(1).nonzero()[:, 0], light.any(0).nonzero()[:, 0]
        seen = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
        np.testing.assert_allclose(on_pixels(torch.tensor([box]), size, backbone.preprocess)[0], seen, atol=1.2)


def test_strength_zero_is_clip(backbone):
    images = [random_image(seed=i) for i in range(3)]
    plain = create("zero-shot").fit(backbone, class_names=NAMES).image_logits(images)[0]
    for region in ("saliency", "centre"):
        model = create("falip", strength=0.0, region=region).fit(backbone, class_names=NAMES)
        torch.testing.assert_close(model.image_logits(images)[0], plain, atol=1e-5, rtol=0)
    pixels = torch.stack([backbone.preprocess(image) for image in images])
    boxes = torch.tensor([[0.0, 0, 16, 16]] * 3)
    with torch.no_grad(), backbone.attention(layers=[2]):
        read = backbone.encode_images(pixels)  # through the same function, with no bias at all
        assert torch.equal(encode_regions(backbone, pixels, boxes, strength=0.0, sigma=100.0, layers=1), read)


@torch.no_grad()
def test_the_tower_by_hand(backbone):
    """Only the class token's row of the last blocks changes, by the mask, in all heads."""
    pixels = torch.stack([backbone.preprocess(random_image(seed=i)) for i in range(2)])
    boxes = torch.tensor([[0.0, 0, 16, 16], [10, 4, 30, 20]])
    masks = foveal_mask(boxes, (4, 4), 8, strength=3.0, sigma=2.0)
    model = backbone.model.vision_model
    rows = model.pre_layrnorm(model.embeddings(pixels))
    for number, block in enumerate(model.encoder.layers):
        normed = block.layer_norm1(rows)
        q, k, v = (
            getattr(block.self_attn, f"{name}_proj")(normed).unflatten(-1, (2, 16)).transpose(1, 2) for name in "qkv"
        )
        scores = q @ k.transpose(-1, -2) / 4  # (B, heads, 17, 17)
        if number >= 1:
            scores[:, :, 0, 1:] += masks[:, None]
        rows = rows + block.self_attn.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        rows = rows + block.mlp(block.layer_norm2(rows))
    expected = backbone.model.visual_projection(model.post_layernorm(rows[:, 0]))
    expected = torch.nn.functional.normalize(expected, dim=1)
    found = encode_regions(backbone, pixels, boxes, strength=3.0, sigma=2.0, layers=2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(found, backbone.encode_images(pixels), atol=1e-3)


def test_the_last_third_of_the_blocks_by_default(backbone):
    pixels, boxes = backbone.preprocess(random_image())[None], torch.tensor([[0.0, 0, 16, 16]])
    with torch.no_grad():
        features = {
            n: encode_regions(backbone, pixels, boxes, strength=2.0, sigma=9.0, layers=n) for n in (None, 1, 3, 9)
        }
    assert torch.equal(features[None], features[1])  # of 3
    assert torch.equal(features[3], features[9])
    assert not torch.allclose(features[1], features[3])


def test_given_boxes_and_where_they_come_from(backbone):
    images = [random_image(64, 48, seed=i) for i in range(3)]
    boxes = [(0, 0, 30, 30), (20, 10, 60, 40), (5, 5, 15, 15)]
    settings = {"strength": 4.0, "sigma": 2.0}
    model = create("falip", **settings).fit(backbone, class_names=NAMES)
    given = model.image_logits(images, boxes=boxes)[0]
    texts = [f"a photo of a {name}." for name in NAMES]
    for image, box, row in zip(images, boxes, given, strict=True):
        score = score_regions(backbone, image, [box, (0, 0, 64, 48)], texts, **settings)
        assert score.shape == (2, 4)
        torch.testing.assert_close(score[0], row, atol=1e-4, rtol=0)
    lookup = {image.tobytes(): box for image, box in zip(images, boxes, strict=True)}
    called = create("falip", region=lambda p, names: ([lookup[p.tobytes()]], [1.0], [0]), **settings)
    torch.testing.assert_close(called.fit(backbone, class_names=NAMES).image_logits(images)[0], given)
    nothing = create("falip", region=lambda p, names: ([], [], []), **settings).fit(backbone, class_names=NAMES)
    everywhere = model.image_logits(images, boxes=[(0, 0, 64, 48)] * 3)[0]
    torch.testing.assert_close(nothing.image_logits(images)[0], everywhere)
    centre = create("falip", region="centre", **settings).fit(backbone, class_names=NAMES)
    torch.testing.assert_close(
        centre.image_logits(images)[0], model.image_logits(images, boxes=[(16, 12, 48, 36)] * 3)[0]
    )
    # an unreadable image takes its box with it
    kept = model.image_logits([images[0], "missing.jpg", images[2]], boxes=boxes, on_error="skip")
    assert kept[1] == [0, 2]
    torch.testing.assert_close(kept[0], given[[0, 2]])


def test_pixels_keep_their_own_coordinates(backbone):
    """Of pixels as large as they are, boxes are in these pixels, whatever the tower was trained on."""
    pixels = torch.stack([backbone.preprocess(random_image(seed=i)) for i in range(2)])
    model = create("falip", strength=3.0).fit(backbone, class_names=NAMES)
    boxes = [(0, 0, 10, 10), (8, 8, 32, 30)]
    images = [random_image(seed=i) for i in range(2)]
    torch.testing.assert_close(model.image_logits(pixels, boxes=boxes)[0], model.image_logits(images, boxes=boxes)[0])
    large = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = encode_regions(
        backbone, large, torch.tensor([[40.0, 40, 60, 60]]), strength=3.0, sigma=100.0, layers=None
    )
    logits = model.image_logits(large, boxes=[(40, 40, 60, 60)])[0]
    torch.testing.assert_close(logits, backbone.logit_scale * expected @ model._texts.T, atol=1e-4, rtol=0)


def test_bad_input(backbone):
    model = create("falip").fit(backbone, class_names=NAMES)
    with pytest.raises(ClipadaptError, match="one for each of the 2 images"):
        model.image_logits([random_image(), random_image()], boxes=[(0, 0, 4, 4)])
    for boxes in ([(4, 0, 4, 4)], [(0, 0, 4)], [(0, 0, 4, float("inf"))]):
        with pytest.raises(ClipadaptError, match="left < right"):
            as_boxes(boxes)
    with pytest.raises(ClipadaptError, match="class-token"):
        score_regions(load_backbone(tiny_siglip()), random_image(), [(0, 0, 4, 4)], ["a cat"])
    with pytest.raises(ClipadaptError, match="class-token"):
        create("falip").fit(load_backbone(tiny_siglip()), class_names=NAMES)
    with pytest.raises(ClipadaptError, match="not at features"):
        model.logits(np.eye(16))
    assert score_regions(backbone, random_image(), np.zeros((0, 4)), ["a cat"]).shape == (0, 1)


@pytest.mark.claim("falip", "of two things in a drawing it tells which one words mean, better than a red circle does")
def test_it_selects_regions_that_expressions_refer_to(claim):
    """Two things in an image, their boxes known: far more often right than chance, where a red circle is not."""
    backbone = load_backbone()
    worlds = [Playground(size=96, kinds=TRAIN_KINDS, styles=TRAIN_STYLES, seed=seed) for seed in (11, 12, 13)]
    foveal, circled = [], []
    for world, i in product(worlds, range(8)):
        scene = world.scene(i, relation=("left of", "above")[i % 2])
        boxes = [o.box for o in scene.objects]
        texts = [f"a photo of a {o.colour} {o.kind}" for o in scene.objects]
        foveal += (score_regions(backbone, scene.image, boxes, texts).argmax(0) == torch.arange(2)).tolist()
        drawn = []
        for left, top, right, bottom in boxes:
            drawn.append(scene.image.copy())
            ImageDraw.Draw(drawn[-1]).ellipse((left, top, right - 1, bottom - 1), outline="red", width=1)
        with torch.no_grad():
            features = backbone.encode_images(torch.stack([backbone.preprocess(image) for image in drawn]))
            circled += ((features @ backbone.encode_texts(texts).T).argmax(0) == torch.arange(2)).tolist()
    claim({"falip": np.reshape(foveal, (3, -1)).mean(1), "red circle": np.reshape(circled, (3, -1)).mean(1)})
    assert np.mean(foveal) > 0.8
    assert np.mean(foveal) > np.mean(circled) + 0.2
