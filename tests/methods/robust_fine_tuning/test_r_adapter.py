"""R-Adapter: merged equals attached, its training equals a plain one, its three ensembles at their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy, normalize

from clipadapt.backbones import load_backbone
from clipadapt.data import class_texts
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from clipadapt.methods.kinds.weights import Captions
from clipadapt.nn.updates import LinearAdapters
from clipadapt.training.loop import batches, seeded
from clipadapt.training.schedules import cosine
from tests.images import colours
from tests.tiny import tiny

QUICK = {"lr": 3e-2, "epochs": 3, "batch_size": 6, "min_scale": 1.0}


@pytest.fixture(scope="module")
def pixels(backbone):
    return torch.stack([backbone.preprocess(item.open()) for item in colours(2, seed=2).items])


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize(("rank", "scale"), [(4, 0.5), (None, 1.0)])
def test_merged_equals_attached(family, rank, scale, support):
    backbone = load_backbone(tiny(family))
    model = create("r-adapter", **QUICK, rank=rank, scale=scale).fit(backbone, support)
    sites = backbone.target_modules(kinds=("o", "fc2"))
    adapters = LinearAdapters.restore(model.update_, backbone.model, sites, rank)
    with torch.no_grad():
        for part in adapters.parts:
            part.scale *= scale
    pixels = torch.stack([backbone.preprocess(item.open()) for item in support.items])
    plain = backbone.encode_images(pixels), backbone.encode_texts(support.class_names)
    with adapters.attached(backbone.model):
        attached = backbone.encode_images(pixels), backbone.encode_texts(support.class_names)
    merged = model.backbone_.encode_images(pixels), model.backbone_.encode_texts(support.class_names)
    for before, one, other in zip(plain, attached, merged, strict=True):
        assert (before - one).abs().max() > 1e-3
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
    assert all(name.endswith(("weight", "bias")) for name in model.changed())
    assert len(model.changed()) == 2 * len(adapters.parts)


def test_no_scale_is_zero_shot_and_no_rate_too(backbone, support):
    queries = colours(2, seed=2)
    zero_shot = create("zero-shot").fit(backbone, support).predict_proba(queries)
    for changed in ({"scale": 0.0}, {"lr": 0.0}):
        model = create("r-adapter", **{**QUICK, **changed}).fit(backbone, support)
        np.testing.assert_allclose(model.predict_proba(queries), zero_shot, atol=1e-6)


def test_training_equals_a_plain_one(backbone, support):
    """Two towers with weights merged at every step, instead of hooks; the running mean as one explicit sum."""
    values = {**QUICK, "drop": 0.0, "ema": 0.7, "margin": 0.1, "smoothing": 0.05, "seed": 3}
    model = create("r-adapter", **values).fit(backbone, support)
    sites = backbone.target_modules(kinds=("o", "fc2"))
    with seeded(3):
        fresh = LinearAdapters(backbone.model, sites, 4, scale=0.1)
    start = [p.detach().clone() for p in fresh.parameters()]
    parts = [[p.detach().clone().requires_grad_() for p in (part.scale, part.down, part.up)] for part in fresh.parts]
    flat = [p for part in parts for p in part]
    state = backbone.model.state_dict()
    inputs = torch.stack([backbone.preprocess(item.open()) for item in support.items])
    ids = backbone.tokenize([f"a photo of a {name}." for name in support.class_names])
    labels = torch.tensor(support.labels)
    steps = batches(len(support), 6, epochs=3, seed=3)
    optimizer = torch.optim.AdamW(flat, weight_decay=0.0)
    history = []
    for number, rows in enumerate(steps):
        optimizer.param_groups[0]["lr"] = 3e-2 * cosine(number, len(steps), len(steps) // 10)
        optimizer.zero_grad()
        weights = dict(state)
        for site, (scale, down, up) in zip(sites, parts, strict=True):
            matrix = torch.eye(len(up)) + scale * up @ down
            weights[f"{site}.weight"] = matrix @ state[f"{site}.weight"]
            weights[f"{site}.bias"] = matrix @ state[f"{site}.bias"]

        class Both(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = backbone.model

            def forward(self, pixels, ids):
                images = self.inner.get_image_features(pixels).pooler_output
                return images, self.inner.get_text_features(input_ids=ids).pooler_output

        named = {f"inner.{name}": tensor for name, tensor in weights.items()}
        images, texts = functional_call(Both(), named, (inputs[rows], ids[labels[rows]]))
        y = labels[rows]
        same = (y[:, None] == y[None]).float()
        positives, negatives = same.sum(1, keepdim=True), (1 - same).sum(1, keepdim=True)
        target = 0.95 * same / positives + 0.05 * (1 - same) / negatives
        scores = backbone.logit_scale * (normalize(images, dim=1) @ normalize(texts, dim=1).T + 0.1 * (1 - same))
        loss = (cross_entropy(scores, target) + cross_entropy(scores.T, target)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flat, 1.0)
        optimizer.step()
        history.append([p.detach().clone() for p in flat])
    total = len(history)
    for i, (name, ours) in enumerate(model.update_.items()):
        expected = 0.7**total * start[i] + sum(0.3 * 0.7 ** (total - 1 - t) * step[i] for t, step in enumerate(history))
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4, msg=name)


def test_what_the_options_do(backbone, support, pixels):
    def features(**changed):
        return create("r-adapter", **{**QUICK, **changed}).fit(backbone, support).backbone_.encode_images(pixels)

    plain = features()
    for changed in ({"drop": 0.0}, {"ema": 0.0}, {"margin": 0.0}, {"loss": "info-nce"}, {"rank": None}, {"seed": 2}):
        assert (features(**changed) - plain).abs().max() > 1e-4, changed
    torch.testing.assert_close(features(ema=1.0), backbone.encode_images(pixels), rtol=0, atol=1e-6)


def test_a_caption_is_of_the_class_and_depends_on_the_step(backbone):
    templates = ["a photo of a {}.", "a {}", "the {}"]
    texts = class_texts(["red cat", "blue dog"], templates)
    captions = Captions(backbone, texts, seed=1)
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    every = [backbone.encode_texts(sentences) for sentences in texts]
    drawn = set()
    for number in range(4):
        features = captions.encode(labels, number)
        torch.testing.assert_close(features, captions.encode(labels, number), rtol=0, atol=0)
        nearest = [int((every[label] @ row).argmax()) for label, row in zip(labels, features, strict=True)]
        for label, row, which in zip(labels, features, nearest, strict=True):
            torch.testing.assert_close(every[label][which], row, rtol=0, atol=1e-5)
        drawn.add(tuple(nearest))
    assert len(drawn) == 4


def test_wise_ft_takes_it(backbone, support, pixels):
    inner = create("r-adapter", **QUICK, scale=1.0)
    half = create("wise-ft", method=inner, alpha=0.5).fit(backbone, support)
    rescaled = create("r-adapter", **QUICK, scale=0.5).fit(backbone, support)
    torch.testing.assert_close(
        half.backbone_.encode_images(pixels), rescaled.backbone_.encode_images(pixels), rtol=0, atol=1e-5
    )


def test_bad_values():
    for name, value in (("drop", 1.0), ("scale", 1.5), ("rank", 0), ("smoothing", 1.0), ("loss", "nce")):
        with pytest.raises(ClipadaptError, match=name):
            create("r-adapter", **{name: value})
