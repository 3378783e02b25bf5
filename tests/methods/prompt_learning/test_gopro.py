"""GOPro against plain slow computations: statistics, shifts, the three losses, and what each variant may change."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from clipadapt.backbones import Backbone, Insertion, load_backbone
from clipadapt.methods import TrainingData, create
from clipadapt.methods.kinds.prompts import Batch
from clipadapt.methods.prompt_learning.gopro import StyleLearner, encode_with_statistics, views_of
from clipadapt.nn.prompts import word_vectors
from tests.images import colours
from tests.learners import coop
from tests.tiny import tiny_clip

NAMES = ["red", "green", "cat", "small house"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(tiny_clip())


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))  # images, views


def learner(backbone: Backbone, **options) -> StyleLearner:
    torch.manual_seed(3)
    made = create("gopro", **options).bind(backbone, NAMES)
    torch.nn.init.normal_(made.projector.weight, std=0.1)  # away from its start at zero
    return made


def batch_of(backbone: Backbone, pixels: torch.Tensor) -> Batch:
    features, seen = encode_with_statistics(backbone, pixels.flatten(0, 1))
    rows = torch.cat([features, seen.flatten(1)], 1).unflatten(0, pixels.shape[:2])
    return Batch(torch.arange(len(pixels)), torch.arange(len(pixels)) % 4, rows, None)


def slow_shift(made: StyleLearner, backbone: Backbone, image: torch.Tensor) -> torch.Tensor:
    """One image (3, H, W) -> (W,), block by block, from what transformers itself reports."""
    states = backbone.model.vision_model(image[None], output_hidden_states=True).hidden_states[1:]
    total = made.rho.bias.clone()
    for i, state in enumerate(states):
        rows = state[0]  # (L, Wv)
        mean = sum(rows) / len(rows)
        deviation = (sum((row - mean) ** 2 for row in rows) / len(rows)).sqrt()
        style, content = made.style[i]((mean + deviation) / 2), made.content[i](mean)
        total = total + made.rho.weight[0, i] * (style + content) / 2
    return total


def slow_texts(made: StyleLearner, backbone: Backbone, shift: torch.Tensor) -> torch.Tensor:
    """(W,) -> (C, D): the prompts as plain texts with all context rows replaced."""
    ids = backbone.tokenize([f"a photo of a {name}." for name in NAMES])
    with backbone.inserted(text=[Insertion(made.context + shift)]):
        return backbone.encode_tokens(ids)


@pytest.mark.parametrize("projector", ["logits", "contrast"])
def test_loss_is_that_of_a_slow_computation(backbone, pixels, projector):
    made = learner(backbone, projector=projector, consistency=20.0, contrast=0.3, temperature=0.2)
    batch = batch_of(backbone, pixels)
    texts = [[slow_texts(made, backbone, slow_shift(made, backbone, view)) for view in views] for views in pixels]
    features = backbone.encode_images(pixels.flatten(0, 1)).unflatten(0, (3, 3))
    projected = features + features @ made.projector.weight.T + made.projector.bias
    projected = normalize(projected, dim=-1)
    shown = projected if projector == "logits" else features
    logits = torch.stack([backbone.logit_scale * shown[i, 0] @ texts[i][0].T for i in range(3)])
    consistency = sum(((texts[i][0] - texts[i][v]) ** 2).mean() / 3 for i in range(3) for v in (1, 2))
    if projector == "contrast":

        def normed(view: torch.Tensor) -> torch.Tensor:
            lines = view @ made.projector.weight.T + made.projector.bias
            return (lines - lines.mean(0)) / (lines.var(0, correction=0) + 1e-5).sqrt()

        left, right = normalize(normed(features[:, 0]), dim=1), normalize(normed(features[:, 1]), dim=1)
    else:
        left, right = projected[:, 0], projected[:, 1]
    contrast = torch.zeros(())
    for one, other in ((left, right), (right, left)):
        for i in range(3):
            scores = torch.cat([one[i] @ other.T, (one[i] @ one.T)[torch.arange(3) != i]]) / 0.2
            contrast = contrast + (scores.logsumexp(0) - scores[i]) / 6
    loss, hits = made.loss(batch)
    wanted = cross_entropy(logits, batch.labels) + 20 * consistency + 0.3 * contrast
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(hits, logits.argmax(1) == batch.labels)
    with torch.no_grad():
        torch.testing.assert_close(made.logits(made.images(pixels[:, 0]), made.texts()), logits, rtol=1e-4, atol=1e-4)


def test_it_is_coop_without_shift(backbone, pixels):
    """Maps at zero and an identity projector give CoOp with the same context; `start="zero"` begins there."""
    plain = coop(backbone, NAMES, word_vectors(backbone, "a photo of a"))
    wanted = plain.logits(backbone.encode_images(pixels[:, 0]), plain.texts())
    made = create("gopro").bind(backbone, NAMES)
    with torch.no_grad():
        assert not torch.allclose(made.logits(made.images(pixels[:, 0]), made.texts()), wanted, atol=1e-3)
        for name, parameter in made.named_parameters():
            if name.startswith(("style", "content")) or name == "rho.bias":
                parameter.zero_()
        torch.testing.assert_close(made.logits(made.images(pixels[:, 0]), made.texts()), wanted, rtol=1e-4, atol=1e-4)
    started = create("gopro", start="zero").bind(backbone, NAMES)
    torch.testing.assert_close(
        started.logits(started.images(pixels[:, 0]), started.texts()), wanted, rtol=1e-4, atol=1e-4
    )


def test_prompts_follow_the_image(backbone, pixels):
    made = learner(backbone)
    with torch.no_grad():
        shifts = made.images(torch.cat([pixels[:, 0], pixels[:1, 0]]))[:, backbone.dim :]
        texts = made.texts_for(shifts)
    torch.testing.assert_close(texts[0], texts[3])
    assert (texts[0] - texts[1]).abs().max() > 1e-3


def test_equal_views_are_consistent(backbone, pixels):
    same = pixels[:, :1].expand(-1, 3, -1, -1, -1)
    batch = batch_of(backbone, same)
    losses = [learner(backbone, consistency=w, contrast=0.0).loss(batch)[0] for w in (0.0, 100.0)]
    torch.testing.assert_close(*losses)
    other = batch_of(backbone, pixels)
    losses = [learner(backbone, consistency=w, contrast=0.0).loss(other)[0] for w in (0.0, 100.0)]
    assert losses[1] > losses[0] + 1e-3


@pytest.mark.parametrize("projector", ["logits", "contrast"])
def test_what_each_loss_reaches(backbone, pixels, projector):
    """In the released variant the contrastive loss shares no parameter with the logits; in the figure's it does."""
    made, batch = learner(backbone, projector=projector), batch_of(backbone, pixels)
    parameters = dict(made.named_parameters())

    def reached(loss: torch.Tensor) -> set[str]:
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {n for n, g in zip(parameters, grads, strict=True) if g is not None and g.abs().sum() > 0}

    features = batch.features[..., : backbone.dim]
    contrast = reached(made.view_contrast(features[:, 0], features[:, 1]))
    made.of.contrast = 0.0
    logits = reached(made.loss(batch)[0])
    assert {"context", "rho.weight", "style.0.weight", "content.2.bias"} <= logits
    assert "projector.weight" in contrast
    assert contrast <= set(parameters) - {"context", "rho.weight"}
    assert bool(contrast & logits) == (projector == "logits")


def test_a_single_image_has_no_contrast(backbone, pixels):
    for projector in ("logits", "contrast"):
        loss, _ = learner(backbone, projector=projector).loss(batch_of(backbone, pixels[:1]))
        assert torch.isfinite(loss)


def test_views_are_encoded_once_and_used_in_turn(backbone):
    data = colours(1, seed=1)
    method = create("gopro", views=2, min_scale=0.5)
    batch = method._batches(backbone, TrainingData(data))
    rows = torch.tensor([2, 0])
    for epoch, places in ((0, [0, 1, 2]), (1, [0, 3, 4]), (2, [0, 1, 2])):
        got = batch(rows, epoch)
        for row, features in zip(rows.tolist(), got.features, strict=True):
            pixels = views_of(backbone, data.items[row], 2, method.seed, 0.5)
            assert pixels.shape == (5, 3, 32, 32)
            encoded, seen = encode_with_statistics(backbone, pixels[places])
            torch.testing.assert_close(features, torch.cat([encoded, seen.flatten(1)], 1), rtol=1e-4, atol=1e-5)
        assert got.labels.tolist() == [2, 0]
    torch.testing.assert_close(
        views_of(backbone, data.items[0], 1, 1, 0.5)[0], backbone.preprocess(data.items[0].open())
    )


def test_released_contrast_changes_no_prediction_and_the_figure_does(backbone):
    data = dataclasses.replace(colours(2, seed=1))
    settings = {"epochs": 3, "views": 1, "lr": 0.05, "batch_size": 4}
    for projector, changes in (("contrast", False), ("logits", True)):
        one, other = (
            create("gopro", projector=projector, contrast=w, **settings).fit(backbone, data).predict_proba(data)
            for w in (0.0, 5.0)
        )
        assert (abs(one - other).max() > 1e-4) == changes


def test_new_classes(backbone):
    data = colours(2, seed=1)
    model = create("gopro", epochs=1, views=1).fit(backbone, data)
    other = model.with_classes(["house", "star", "dog"])
    assert other.predict_proba(data).shape == (8, 3)
    again = other.with_classes(data.class_names)
    torch.testing.assert_close(again.image_logits(data)[0], model.image_logits(data)[0], rtol=1e-4, atol=1e-4)
