"""SAFT: the mask is the gradient's, training is that of a masked dense optimiser, and only the sparse part is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

import clipadapt
from clipadapt.backbones import load_backbone
from clipadapt.features import encode_classes
from clipadapt.methods import create
from clipadapt.methods.peft_weights.saft import chosen
from tests.images import colours
from tests.tiny import tiny, tiny_clip

QUICK = {"share": 0.01, "epochs": 3, "lr": 1e-2, "batch_size": 5, "min_scale": 1.0}


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


def towers(backbone):
    return {n: p for n, p in backbone.model.named_parameters() if n != "logit_scale"}


def logits_of(backbone, pixels, ids):
    images = normalize(backbone.model.get_image_features(pixels).pooler_output, dim=1)
    texts = normalize(backbone.model.get_text_features(ids).pooler_output, dim=1)
    return backbone.logit_scale * images @ texts.T


def places_of(model) -> dict[str, torch.Tensor]:
    """The chosen places of a fitted model, by the names of the weights."""
    return {n.removesuffix(".places"): t for n, t in model.update_.items() if n.endswith(".places")}


def test_choosing():
    scores = {
        "a": torch.tensor([[3.0, 9.0], [1.0, 8.0]]),
        "b": torch.tensor([0.5, 0.1]),
        "c": torch.tensor([7.0, 10.0]),
    }
    places = chosen(scores, 4)
    assert {n: p.tolist() for n, p in places.items()} == {"a": [1, 3], "c": [0, 1]}


def test_equals_a_dense_optimiser_with_a_binary_mask(backbone):
    """The mask from one gradient over all images at once; then every gradient is masked."""
    support = colours(3, seed=1)
    model = create("saft", **QUICK).fit(backbone, support)

    dense = backbone.copy()
    weights = towers(dense)
    for p in weights.values():
        p.requires_grad_()
    pixels = torch.stack([backbone.preprocess(item.open()) for item in support.items])
    labels = torch.tensor(support.labels)
    ids = backbone.tokenize([f"a photo of a {name}." for name in support.class_names])
    cross_entropy(logits_of(dense, pixels, ids), labels).backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in weights.items()}
    masks = {n: torch.zeros_like(p) for n, p in weights.items()}
    for name, places in places_of(model).items():
        masks[name].view(-1)[places.long()] = 1
    count = round(0.01 * sum(p.numel() for p in weights.values()))
    assert sum(int(m.sum()) for m in masks.values()) == count == model.trained_parameters
    weakest = min(float(gradients[n].abs()[masks[n] == 1].min()) for n in places_of(model))
    assert all(float((g.abs() * (1 - masks[n])).max()) <= weakest + 1e-7 for n, g in gradients.items())

    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    steps = [rows for _ in range(3) for rows in torch.randperm(12, generator=generator).split(5)]
    for number, rows in enumerate(steps):
        for group in optimizer.param_groups:  # no warm-up in a run of so few steps
            group["lr"] = 1e-2 * (1 + np.cos(np.pi * number / len(steps))) / 2
        optimizer.zero_grad()
        cross_entropy(logits_of(dense, pixels[rows], ids), labels[rows]).backward()
        for name, p in weights.items():
            p.grad = masks[name] * (torch.zeros_like(p) if p.grad is None else p.grad)
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
    original = backbone.model.state_dict()
    for name, ours in model.backbone_.model.state_dict().items():
        if name in places_of(model):
            torch.testing.assert_close(ours, weights[name].detach(), atol=2e-4, rtol=1e-3)
            frozen = masks[name] == 0
            assert torch.equal(ours[frozen], original[name][frozen])
            assert not torch.equal(ours, original[name])
        else:
            assert torch.equal(ours, original[name])


def test_what_the_optimiser_holds_and_what_is_saved(backbone, tmp_path, monkeypatch):
    held = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        held.append(sum(v.numel() for s in self.state.values() for v in s.values() if v.ndim))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    support, queries = colours(3, seed=1), colours(2, seed=2)
    model = create("saft", **QUICK).fit(backbone, support)
    count = model.trained_parameters
    assert held[-1] == 2 * count, "two moments of each chosen weight"
    folder = model.save(tmp_path / "model")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    dense = 4 * sum(p.numel() for p in towers(backbone).values())
    assert size < 0.2 * dense  # 8 bytes for each of 1 %, and the classifier
    loaded = clipadapt.load(folder, backbone)
    assert places_of(loaded).keys() == loaded.changed().keys()
    assert all(where.dtype == torch.int32 for where in places_of(loaded).values())
    for name, weight in loaded.changed().items():
        assert torch.equal(weight, model.changed()[name])
        assert weight.shape == backbone.model.state_dict()[name].shape
    np.testing.assert_array_equal(loaded.predict_proba(queries), model.predict_proba(queries))


def test_random_mask_is_of_the_same_size_and_by_seed(backbone):
    support = colours(2, seed=1)
    fits = [create("saft", mask="random", seed=s, **QUICK).fit(backbone, support) for s in (1, 1, 2)]
    plain = create("saft", **QUICK).fit(backbone, support)
    assert {model.trained_parameters for model in fits} == {plain.trained_parameters}

    def places(model) -> set[tuple[str, int]]:
        return {(n, i) for n, where in places_of(model).items() for i in where.tolist()}

    assert places(fits[0]) == places(fits[1]) != places(fits[2])
    assert len(places(fits[0]) & places(plain)) < 0.2 * plain.trained_parameters


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_one_tower_only(backbone, tower):
    model = create("saft", tower=tower, **QUICK).fit(backbone, colours(2, seed=1))
    assert all(name.startswith({"vision": "vis", "text": "text"}[tower]) for name in places_of(model))
    same = torch.allclose(model.weight_, backbone.logit_scale * encode_classes(backbone, model.class_names_), atol=1e-4)
    assert same == (tower == "vision")


def test_all_weights_and_interpolation(backbone):
    support, queries = colours(2, seed=1), colours(2, seed=2)
    every = create("saft", **{**QUICK, "share": 1.0, "epochs": 1}).fit(backbone, support)
    assert every.trained_parameters == sum(p.numel() for p in towers(backbone).values())
    least = create("saft", **{**QUICK, "share": 1e-9}).fit(backbone, support)
    assert least.trained_parameters == 1
    zero_shot = create("zero-shot").fit(backbone, support).predict_proba(queries)
    start = create("wise-ft", method=create("saft", **QUICK), alpha=0.0).fit(backbone, support)
    np.testing.assert_allclose(start.predict_proba(queries), zero_shot, atol=1e-5)


@pytest.mark.parametrize("family", ["siglip", "siglip2", "altclip"])
def test_other_families(family):
    backbone = load_backbone(tiny(family))
    model = create("saft", **QUICK).fit(backbone, colours(2, seed=1))
    assert model.score(colours(2, seed=2)) >= 0
    assert {name.split("_")[0] for name in places_of(model)} <= {"vision", "visual", "text"}
