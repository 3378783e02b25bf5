"""MAP against plain slow computations: the enhanced tower block by block, both similarities, and its attributes."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

import clipadapt
from clipadapt.backbones import Backbone, Insertion, load_backbone
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from clipadapt.methods.kinds.prompts import Batch
from clipadapt.methods.prompt_learning.map import GENERIC, AttributeLearner, described
from tests.images import COLOURS, colours
from tests.tiny import tiny, tiny_clip

NAMES = ["red", "green", "cat", "small house"]
PHRASES = {
    "red": ["a star", "a dog"],
    "green": ["a cat"],
    "cat": ["the star", "the dog"],
    "small house": ["a dog", "a star"],
}
SETTINGS = {"n_attributes": 2, "n_ctx": 3, "n_visual": 2, "hidden": 12, "top": 2, "joiner": ", "}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(tiny_clip())


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def learner(backbone: Backbone, *, start: bool = False, **changes) -> AttributeLearner:
    """Away from where the enhancement starts, unless `start`."""
    method = create("map", attributes=PHRASES, **{**SETTINGS, **changes})
    method.class_names_ = NAMES
    method.phrases_ = method._phrases()
    torch.manual_seed(5)
    made = method.bind(backbone, NAMES)
    if not start:
        for name, parameter in made.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3 if name == "visual" else 0.15)
    return made


def slow_attention(module: torch.nn.MultiheadAttention, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(P, W) and (K, W) -> (P, W), head by head."""
    width, heads = queries.shape[1], module.num_heads
    q, k, v = (
        rows @ module.in_proj_weight[i * width : (i + 1) * width].T + module.in_proj_bias[i * width : (i + 1) * width]
        for i, rows in enumerate((queries, keys, keys))
    )
    size, parts = width // heads, []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        parts.append((q[:, part] @ k[:, part].T / size**0.5).softmax(1) @ v[:, part])
    return module.out_proj(torch.cat(parts, 1))


def slow_images(made: AttributeLearner, backbone: Backbone, image: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """One image (3, H, W) -> unit features (1 + P, D), through the tower's parts one after the other."""
    tower, module, count = backbone.model.vision_model, made.enhancement, len(made.visual)
    rows = tower.pre_layrnorm(torch.cat([tower.embeddings(image[None]), made.visual[None]], 1))
    for number, block in enumerate(tower.encoder.layers):
        rows = block(rows, None)
        if number == made.layer:
            mapped = [[module.mapper(texts[i, c]) for i in range(len(texts))] for c in range(texts.shape[1])]
            nearness = [float(normalize(rows[0, 0], dim=0) @ normalize(sum(m) / len(m), dim=0)) for m in mapped]
            likely = sorted(range(len(mapped)), key=lambda c: -nearness[c])[: module.top]
            keys = module.norm_attributes(torch.stack([row for c in likely for row in mapped[c]]))
            prompts = rows[0, -count:]
            prompts = prompts + slow_attention(module.attention, module.norm_prompts(prompts), keys)
            prompts = prompts + module.feed_forward(module.norm(prompts))
            rows = torch.cat([rows[:, :-count], prompts[None]], 1)
    kept = torch.cat([rows[0, :1], rows[0, -count:]])
    return normalize(backbone.model.visual_projection(tower.post_layernorm(kept)), dim=1)


def slow_texts(made: AttributeLearner, backbone: Backbone) -> torch.Tensor:
    """(N, C, D): whole sentences with the context rows replaced."""
    features = []
    for i, context in enumerate(made.context):
        sentences = []
        for name in NAMES:
            phrases = PHRASES[name]
            sentences.append(f"a a a {name}, {phrases[i]}" if i < len(phrases) else f"a a a {name}.")
        with backbone.inserted(text=[Insertion(context)]):
            features.append(backbone.encode_texts(sentences, normalize=False))
    return torch.stack(features)


def slow_transport(left: torch.Tensor, right: torch.Tensor) -> float:
    """sum T cos of unit features (P, D) and (N, D), T from Sinkhorn's scaling in double precision."""
    cosines = (left @ right.T).double()
    kernel, p, n = ((cosines - 1) / 0.1).exp(), *cosines.shape
    columns = torch.ones(n, dtype=torch.float64)
    for _ in range(2000):
        rows = (1 / p) / (kernel @ columns)
        columns = (1 / n) / (kernel.T @ rows)
    return float((rows[:, None] * kernel * columns * cosines).sum())


@pytest.mark.parametrize("layer", [0, None, 2])
def test_logits_are_those_of_a_slow_computation(backbone, pixels, layer):
    made = learner(backbone, layer=layer, weight=0.7)
    assert made.layer == (1 if layer is None else layer)
    with torch.no_grad():
        texts = made.texts()
        torch.testing.assert_close(texts, slow_texts(made, backbone), rtol=1e-4, atol=1e-4)
        images = made.images(pixels)
        assert images.shape == (3, made.image_dim)
        slow = torch.stack([slow_images(made, backbone, image, texts) for image in pixels])  # (B, 1 + P, D)
        torch.testing.assert_close(images, slow.flatten(1), rtol=1e-4, atol=1e-4)
        unit = normalize(texts, dim=-1)
        wanted = torch.empty(3, 4)
        for b in range(3):
            for c in range(4):
                cosine = sum(float(slow[b, 0] @ unit[i, c]) for i in range(2)) / 2
                wanted[b, c] = backbone.logit_scale * (cosine + 0.7 * slow_transport(slow[b, 1:], unit[:, c]))
        torch.testing.assert_close(made.logits(images, texts), wanted, rtol=1e-3, atol=1e-3)
    loss, hits = made.loss(Batch(torch.arange(3), torch.tensor([1, 0, 2]), None, pixels))
    torch.testing.assert_close(loss.detach(), cross_entropy(wanted, torch.tensor([1, 0, 2])), rtol=1e-3, atol=1e-3)
    assert torch.equal(hits, wanted.argmax(1) == torch.tensor([1, 0, 2]))


def test_it_starts_from_plain_visual_prompts(backbone, pixels):
    made = learner(backbone, start=True)
    with torch.no_grad():
        images = made.images(pixels)
        with backbone.inserted(vision=[Insertion(made.visual, at=-2, mode="insert")]):
            plain = backbone.encode_images(pixels)
    torch.testing.assert_close(images[:, : backbone.dim], plain)


def test_without_weight_it_is_the_mean_cosine(backbone, pixels):
    made = learner(backbone, weight=0.0)
    with torch.no_grad():
        images, texts = made.images(pixels), made.texts()
        means = torch.stack([images[:, : backbone.dim] @ normalize(t, dim=1).T for t in texts]).mean(0)
        torch.testing.assert_close(made.logits(images, texts), backbone.logit_scale * means)


def test_the_order_within_a_set_does_not_matter(backbone, pixels):
    made = learner(backbone)
    with torch.no_grad():
        images, texts = made.images(pixels), made.texts()
        wanted = made.logits(images, texts)
        torch.testing.assert_close(made.logits(images, texts.flip(0)), wanted, rtol=1e-3, atol=1e-3)
        made.visual.copy_(made.visual.flip(0))
        turned = made.logits(made.images(pixels), texts)
    torch.testing.assert_close(turned, wanted, rtol=1e-3, atol=1e-3)


def test_the_nearest_classes_enhance(backbone, pixels):
    """A class beyond the nearest `top` changes nothing in an image's features; one more place lets it in."""
    made = learner(backbone, top=3)
    with torch.no_grad():
        texts = made.texts()
        images = made.images(pixels)
        without = torch.stack([made.images_among(pixels, texts[:, torch.arange(4) != c]) for c in range(4)])
        same = torch.isclose(without, images, atol=1e-5).all(2)  # (C, B)
        assert same.sum(0).tolist() == [1, 1, 1]  # only the class that is farthest from the image
        made.enhancement.top = 10
        assert not torch.isclose(made.images(pixels), images, atol=1e-5).all(1).any()


def test_gradients_reach_everything(backbone, pixels):
    made = learner(backbone)
    made.loss(Batch(torch.arange(3), torch.tensor([1, 0, 2]), None, pixels))[0].backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert not any(p.grad is not None for p in backbone.model.parameters())


@pytest.mark.parametrize("family", ["siglip", "chinese_clip"])
def test_other_families(family, pixels):
    """Also where no row stands for the image, and where texts are not causal."""
    other = load_backbone(tiny(family))
    made = learner(other)
    loss, _ = made.loss(Batch(torch.arange(3), torch.tensor([1, 0, 2]), None, pixels))
    loss.backward()
    assert made.visual.grad.abs().sum() > 0
    assert made.images(pixels).shape == (3, 3 * other.dim)


# -- attributes --------------------------------------------------------------------------------------------------------


def test_a_phrase_loses_the_words_that_do_not_fit(backbone):
    """The tower takes 16 tokens: start, 3 of context, name, phrase, end."""
    assert described(backbone, "cat", "a star of the dog", ", ", 3) == "cat, a star of the dog"
    assert described(backbone, "cat", "a star of the small red house of the dog", ", ", 3) == (
        "cat, a star of the small red house of the"
    )
    assert described(backbone, "small_cat", "abcdefghijklmnop star", ", ", 3) == "small_cat."
    assert described(backbone, "cat", None, ", ", 3) == "cat."


def test_attributes_from_a_file_are_kept_with_the_model(backbone, tmp_path):
    data = colours(1, seed=1)
    path = tmp_path / "attributes.json"
    path.write_text(json.dumps({name: ["a star", "a dog"] for name in [*COLOURS, "cat", "house"]}))
    model = create("map", attributes=str(path), epochs=1, min_scale=1.0, **SETTINGS).fit(backbone, data)
    assert model.phrases_ == [["a star", "a dog"]] * 4
    other = model.with_classes(["cat", "house"])
    assert other.predict_proba(data).shape == (4, 2)
    again = other.with_classes(data.class_names)
    torch.testing.assert_close(again.image_logits(data)[0], model.image_logits(data)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ClipadaptError, match="'dog'"):
        model.with_classes(["cat", "dog"])
    folder = other.save(tmp_path / "model")
    path.unlink()
    loaded = clipadapt.load(folder, backbone)
    torch.testing.assert_close(loaded.image_logits(data)[0], other.image_logits(data)[0], rtol=1e-4, atol=1e-4)


def test_without_attributes_all_classes_have_the_generic_ones(backbone):
    data = colours(1, seed=1)
    model = create("map", epochs=1, min_scale=1.0, **SETTINGS).fit(backbone, data)
    assert model.phrases_ == [list(GENERIC)] * 4
    assert model.with_classes(["cat", "house", "dog"]).predict_proba(data).shape == (4, 3)


def test_a_layer_that_the_tower_has_not_is_refused(backbone):
    with pytest.raises(ClipadaptError, match=r"map: Layer 3 is outside"):
        create("map", layer=3, epochs=1, **SETTINGS).fit(backbone, colours(1, seed=1))
