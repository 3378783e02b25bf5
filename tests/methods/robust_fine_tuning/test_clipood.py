"""CLIPood: its loss in the official form and the paper's, and the average recomputed from the weights of every step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from clipadapt.backbones import load_backbone
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_classes
from clipadapt.methods import create
from clipadapt.methods.robust_fine_tuning.clipood import margin_logits
from tests.images import colours
from tests.tiny import tiny_clip

QUICK = {"epochs": 3, "lr": 1e-3, "batch_size": 8, "min_scale": 1.0}


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


def test_loss_is_the_papers_and_that_of_the_official_code():
    generator = torch.Generator().manual_seed(0)
    images, texts = (normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (6, 4))
    labels = torch.tensor([0, 1, 2, 3, 1, 1])
    ours = cross_entropy(22.5 * margin_logits(images, texts, labels, 0.3), labels)
    official = cross_entropy(22.5 * (images - 0.3 * texts[labels]) @ texts.T, labels)
    paper = []
    for x, y in zip(images, labels.tolist(), strict=True):
        terms = [torch.exp(22.5 * (x @ t + 0.3 * (1 - texts[y] @ t))) for t in texts]
        paper.append(-torch.log(torch.exp(22.5 * x @ texts[y]) / sum(terms)))
    torch.testing.assert_close(ours, official)
    torch.testing.assert_close(ours, torch.stack(paper).mean())
    assert ours > cross_entropy(22.5 * images @ texts.T, labels), "a margin makes the task harder"
    torch.testing.assert_close(margin_logits(images, texts, labels, 0.0), images @ texts.T)


def plain_run(backbone, support, margin: float) -> list[dict[str, torch.Tensor]]:
    """The image tower's weights before the first and after every step, by a loop that shares nothing with ours."""
    copy = backbone.copy()
    tower = {n: p for n, p in copy.model.named_parameters() if n.startswith("vis")}
    for p in tower.values():
        p.requires_grad_()
    optimizer = torch.optim.AdamW(tower.values(), lr=1e-3, weight_decay=0.1)
    pixels = torch.stack([backbone.preprocess(item.open()) for item in support.items])
    labels, texts = torch.tensor(support.labels), encode_classes(backbone, support.class_names)
    generator = torch.Generator().manual_seed(1)
    steps = [rows for _ in range(3) for rows in torch.randperm(12, generator=generator).split(8)]
    history = [{n: p.detach().clone() for n, p in tower.items()}]
    for number, rows in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + np.cos(np.pi * number / len(steps))) / 2
        images = normalize(copy.model.get_image_features(pixels[rows]).pooler_output, dim=1)
        logits = backbone.logit_scale * (images - margin * texts[labels[rows]]) @ texts.T
        optimizer.zero_grad()
        cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
        history.append({n: p.detach().clone() for n, p in tower.items()})
    return history


@pytest.mark.parametrize("beta", [0.5, 0.1, None])
def test_the_weights_are_the_beta_average_of_a_plain_run(backbone, beta):
    from scipy.stats import beta as density  # official code takes the weights from there

    support = colours(3, seed=1)
    model = create("clipood", beta=beta, **QUICK).fit(backbone, support)
    history = plain_run(backbone, support, margin=0.3)
    steps = len(history) - 1
    a = np.array([density.pdf((t + 0.5) / (steps + 1), beta, beta) for t in range(steps + 1)]) if beta else None
    for name, ours in model.update_.items():
        if name.endswith("k_proj.bias"):  # it has no influence: Adam steps by the rounding errors of its gradient
            continue
        seen = torch.stack([weights[name] for weights in history])
        expected = seen[-1] if a is None else torch.einsum("t,t...->...", torch.tensor(a / a.sum()).float(), seen)
        moved = (seen[-1] - seen[0]).abs().mean()
        assert (ours - expected).abs().mean() <= 0.01 * moved, name
        assert moved > 0


def test_options_for_the_ablation_do_what_they_say(backbone):
    support, queries = colours(3, seed=1), colours(2, seed=2)
    zero_shot = create("zero-shot").fit(backbone, support).predict_proba(queries)
    fits = {
        (margin, beta): create("clipood", margin=margin, beta=beta, **QUICK).fit(backbone, support)
        for margin in (0.0, 0.3)
        for beta in (None, 0.5)
    }

    def distance(model) -> float:
        start = backbone.model.state_dict()
        return sum(float((w - start[n]).square().sum()) for n, w in model.update_.items())

    assert distance(fits[0.3, 0.5]) < distance(fits[0.3, None]), "the average stays nearer to zero-shot"
    assert distance(fits[0.0, None]) != distance(fits[0.3, None])
    still = create("clipood", **{**QUICK, "lr": 0.0}).fit(backbone, support)
    np.testing.assert_allclose(still.predict_proba(queries), zero_shot, atol=1e-5)


def test_texts_stay_frozen_and_serve_new_classes(backbone):
    model = create("clipood", **QUICK).fit(backbone, colours(3, seed=1))
    assert all(name.startswith("vis") for name in model.update_)
    other = model.with_classes(["cat", "dog", "house"])
    expected = backbone.logit_scale * encode_classes(backbone, ["cat", "dog", "house"])
    torch.testing.assert_close(other.weight_, expected)


def test_bad_settings_are_refused():
    for setting in ({"beta": 0.0}, {"margin": -0.1}, {"beta": "half"}):
        with pytest.raises(ClipadaptError, match=next(iter(setting))):
            create("clipood", **setting)
