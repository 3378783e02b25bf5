"""VDT-Adapter: the official attention written out, classes with few and many sentences, and when it helps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm, normalize

from clipadapt.backbones import load_backbone
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from clipadapt.methods.feature_adapter.vdt_adapter import class_features, dropped, initial, padded
from tests.images import colours
from tests.tiny import tiny_clip

DESCRIBED = {
    "red": ["red is small.", "red is a star.", "a photo of the red."],
    "green": ["green is a house."],
    "blue": ["blue is large.", "blue is a circle."],
    "yellow": "a yellow cat.",
}


def random_weights(dim: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: w + 0.3 * torch.randn(w.shape, generator=generator) for n, w in initial(dim, 3, seed).items()}


def plain(weights: dict[str, torch.Tensor], sentences: torch.Tensor, ratio: float) -> torch.Tensor:
    """One class alone, one sentence after the other."""
    rows = []
    for e in sentences:
        query = weights["w_qs.weight"] @ e
        scores = torch.stack([query @ (weights["w_ks.weight"] @ other) for other in sentences]) / len(query) ** 0.5
        values = torch.stack([weights["w_vs.weight"] @ other for other in sentences])
        out = weights["fc.weight"] @ (scores.softmax(0) @ values) + weights["fc.bias"]
        x = 2 * (ratio * out + (1 - ratio) * e)
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        rows.append(x * weights["layer_norm.weight"] + weights["layer_norm.bias"])
    mean = torch.stack(rows).mean(0)
    return mean / mean.norm()


def test_the_official_attention_on_any_number_of_sentences():
    generator = torch.Generator().manual_seed(1)
    own = [torch.randn(n, 12, generator=generator) for n in (3, 1, 5)]
    rows, there = padded(own, 12)
    assert rows.shape == (3, 5, 12)
    assert there.sum(1).tolist() == [3, 1, 5]
    weights = random_weights()
    ours = class_features(weights, 4 * rows, there, 0.3)
    expected = torch.stack([plain(weights, 4 * normalize(x, dim=1), 0.3) for x in own])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_no_share_is_the_mean_of_normed_sentences():
    rows, there = padded([torch.randn(3, 12, generator=torch.Generator().manual_seed(2))] * 2, 12)
    weights = initial(12, 4, seed=1)
    expected = normalize(layer_norm(rows, (12,), eps=1e-5 / 4).mean(1), dim=1)
    torch.testing.assert_close(class_features(weights, rows, there, 0.0), expected)


def test_the_official_start_values():
    weights = initial(64, 4, seed=1)
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        "w_qs.weight": (16, 64),
        "w_ks.weight": (16, 64),
        "w_vs.weight": (16, 64),
        "fc.weight": (64, 16),
        "fc.bias": (64,),
        "layer_norm.weight": (64,),
        "layer_norm.bias": (64,),
    }
    for name, gain in (("w_qs", 1), ("w_ks", 1), ("w_vs", 0.67), ("fc", 0.67)):
        assert weights[f"{name}.weight"].std().item() == pytest.approx(gain * (2 / 80) ** 0.5, rel=0.08)


def test_drop_out_depends_on_seed_and_step_alone():
    attention, outcome = dropped(200, 300, seed=1, step=7)
    assert set(outcome.unique().tolist()) == {0.0, 2.0}
    assert attention.mean().item() == pytest.approx(1, abs=0.02)
    assert outcome.mean().item() == pytest.approx(1, abs=0.02)
    torch.manual_seed(5)
    torch.testing.assert_close(dropped(200, 300, seed=1, step=7)[1], outcome)
    assert (dropped(200, 300, seed=1, step=8)[1] != outcome).any()
    assert (dropped(200, 300, seed=2, step=7)[1] != outcome).any()


@pytest.mark.parametrize("form", ["mapping", "file"])
def test_descriptions_are_the_sentences(form, tmp_path):
    """From a mapping or a file of it; what it makes of features is what it makes of images; new classes too."""
    backbone, support = load_backbone(tiny_clip()), colours(3, seed=1)
    templates = DESCRIBED
    if form == "file":
        templates = tmp_path / "described.json"
        templates.write_text(json.dumps(DESCRIBED))
    model = create("vdt-adapter", templates=templates, epochs=2).fit(backbone, support)
    lists = [[v] if isinstance(v, str) else v for v in (DESCRIBED[name] for name in support.class_names)]
    with torch.no_grad():
        sentences = [backbone.encode_texts(own) for own in lists]
        pixels = torch.stack([backbone.preprocess(item.open()) for item in support.items])
        images = backbone.encode_images(pixels)
    texts = torch.stack([own.mean(0) for own in sentences])
    head = create("vdt-adapter", epochs=2).fit_features(
        images, support.labels, texts, backbone.logit_scale, sentences=sentences
    )
    torch.testing.assert_close(head.weight_, model.weight_, atol=1e-3, rtol=1e-3)
    other = model.with_classes(["blue", "green"])
    torch.testing.assert_close(other.weight_, model.weight_[[support.class_names.index(n) for n in ("blue", "green")]])
    with pytest.raises(ClipadaptError, match="The class 'owl' has no list of sentences"):
        model.with_classes(["owl", "red"])


def test_sentences_in_one_tensor_are_those_in_a_list():
    rng = np.random.default_rng(0)
    x, t, e = rng.standard_normal((6, 8)), rng.standard_normal((3, 8)), rng.standard_normal((3, 4, 8))
    one = create("vdt-adapter", epochs=2).fit_features(x, np.arange(6) % 3, t, sentences=e)
    two = create("vdt-adapter", epochs=2).fit_features(x, np.arange(6) % 3, t, sentences=list(torch.from_numpy(e)))
    torch.testing.assert_close(one.weight_, two.weight_)


@pytest.mark.claim("vdt-adapter", "made-up features, new classes: attention over sentences against their mean")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_which_sentences_tell(seed, claim):
    """One sentence of four tells what images show, known by its sort; on new classes that beats the mean by far."""
    rng = np.random.default_rng(seed)
    dim, base, new = 32, 240, 60

    def content(n: int) -> np.ndarray:  # the first four directions say of which sort a sentence is
        return np.pad(rng.standard_normal((n, dim - 4)), ((0, 0), (4, 0)))

    centres, own = content(base + new), content(4 * (base + new)).reshape(base + new, 4, dim)
    own[:, 0] = centres
    own += 4 * np.eye(4, dim)
    own = np.stack([rows[rng.permutation(4)] for rows in own])  # (C, 4, D)
    labels = np.repeat(np.arange(base + new), 4)
    x = centres[labels] + content(len(labels))
    means = normalize(torch.from_numpy(own), dim=2).mean(1).numpy()
    learned = labels < base
    model = create("vdt-adapter", ratio=0.5, reduction=1, lr=0.01, epochs=20, batch_size=32).fit_features(
        x[learned], labels[learned], means[:base], 20.0, sentences=own[:base]
    )
    rows, there = padded(list(own[base:]), dim)
    weight = 20.0 * class_features(model.adapter_, model.length * rows, there, model.ratio).numpy()
    adapted, plain_mean = (
        ((x[~learned] @ w.T).argmax(1) == labels[~learned] - base).mean() for w in (weight, means[base:])
    )
    claim({"vdt-adapter": adapted, "mean of sentences": plain_mean})
    assert plain_mean < 0.5
    assert adapted > 0.85


def test_bad_sentences():
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((4, 8)), rng.standard_normal((2, 8))
    with pytest.raises(ClipadaptError, match="sentences are of 3 classes and text_features of 2"):
        create("vdt-adapter").fit_features(x, [0, 1, 0, 1], t, sentences=rng.standard_normal((3, 4, 8)))
    with pytest.raises(ClipadaptError, match=r"sentence features of class 1 must have shape \(N, 8\)"):
        create("vdt-adapter").fit_features(x, [0, 1, 0, 1], t, sentences=[t, rng.standard_normal((4, 7))])
    with pytest.raises(ClipadaptError, match="Class 0 has no sentence features"):
        create("vdt-adapter").fit_features(x, [0, 1, 0, 1], t, sentences=[t[:0], t])
