"""CLIP-LoRA's options: parts of a tower, kinds of layers, ranks, towers; what it adds to a backbone, in memory too."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from clipadapt.backbones import load_backbone
from clipadapt.backbones.weights import lazies
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create, load
from clipadapt.methods.peft_weights.clip_lora import part_of_tower
from clipadapt.nn.updates import LowRank
from tests.images import colours
from tests.pairs import inject
from tests.quick import quick
from tests.tiny import tiny_clip

OFFICIAL = {  # the lists of the official repository, for towers of 12 blocks
    "top1": [11],
    "top2": [10, 11],
    "top3": [9, 10, 11],
    "bottom": [0, 1, 2, 3],
    "mid": [4, 5, 6, 7],
    "up": [8, 9, 10, 11],
    "half-up": [6, 7, 8, 9, 10, 11],
    "half-bottom": [0, 1, 2, 3, 4, 5],
    "all": list(range(12)),
}


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


@pytest.mark.parametrize("part", OFFICIAL)
def test_parts_of_a_tower_of_12(part):
    assert part_of_tower(part, 12) == OFFICIAL[part]


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 24])
def test_parts_of_other_depths(depth):
    thirds = [part_of_tower(part, depth) for part in ("bottom", "mid", "up")]
    halves = [part_of_tower(part, depth) for part in ("half-bottom", "half-up")]
    everything = list(range(depth))
    assert [*chain(*thirds)] == [*chain(*halves)] == part_of_tower("all", depth) == everything
    assert part_of_tower("top3", depth) == everything[-3:]


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 18),
        ({"layers": "all"}, 18),
        ({"layers": "up"}, 6),
        ({"layers": "top2", "tower": "vision"}, 6),
        ({"layers": "half-bottom", "tower": "text", "kinds": ("q",)}, 1),
        ({"layers": [0, -1], "kinds": ("fc1", "fc2")}, 8),
        ({"kinds": ("q", "k", "v", "o", "fc1", "fc2"), "rank": 1}, 36),
    ],
)
def test_what_gets_an_update(backbone, settings, count):
    model = create("clip-lora", steps_per_shot=1, lr=1e-2, min_scale=1.0, **settings).fit(backbone, colours(2, seed=1))
    assert len(model.update_) == 2 * count
    names = {name.removesuffix(".weight") for name in model.changed()}
    assert names == {name[:-2] for name in model.update_}
    if settings.get("layers") == "up":
        assert all(".layers.2." in name for name in names)
    for name, tensor in model.update_.items():
        assert tensor.shape[0 if name.endswith(".A") else 1] == model.rank
    state, before = model.backbone_.model.state_dict(), backbone.model.state_dict()
    assert {n for n in before if not torch.equal(state[n], before[n])} == set(model.changed())


@pytest.mark.parametrize("kind", ["q", "k", "v", "o", "fc1", "fc2"])
@pytest.mark.parametrize("rank", [1, 5])
def test_merged_weights_give_the_same_logits(backbone, kind, rank):
    """Against the pairs of peft, before they are merged."""
    adapted, sites = backbone.copy(), backbone.target_modules("both", (kind,))
    pairs = inject(adapted.model, sites, rank, 3.0, dropout=0.3)
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for tensor in pairs.values():
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    for module in adapted.model.modules():
        module.eval()  # no dropout
    update = LowRank.restore(pairs, backbone.model, sites, rank, 3.0 / rank**0.5)
    both = backbone.with_weights(update.merged(backbone.model))
    pixels = torch.stack([backbone.preprocess(item.open()) for item in colours(2, seed=1).items])
    texts = ["a photo of a cat.", "a dog"]
    with torch.no_grad():
        expected, ours, plain = (
            100 * b.encode_images(pixels) @ b.encode_texts(texts).T for b in (adapted, both, backbone)
        )
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-5)
    assert (plain - expected).abs().max() > 0.1


def test_ten_models_share_one_backbone(backbone):
    """What a fitted model has of its own are factors; no weight of the towers exists twice."""
    supports = [colours(2, seed=seed) for seed in range(10)]
    models = [quick("clip-lora", steps_per_shot=1).fit(backbone, support) for support in supports]
    original = {p.data_ptr(): name for name, p in backbone.model.named_parameters()}
    for model in models:
        held = {name: p.data_ptr() for name, p in model.backbone_.model.named_parameters()}
        assert held.keys() == {*original.values()} - model.changed().keys()
        assert all(original[address] == name for name, address in held.items())
        made = dict(lazies(model.backbone_.model))
        assert made.keys() == model.changed().keys()
        assert all(original[lazy.original.data_ptr()] == name for name, lazy in made.items())
        factors = sum(tensor.numel() for tensor in model.update_.values())
        assert factors == model.trained_parameters < 0.1 * sum(p.numel() for p in backbone.model.parameters())
    pixels = torch.stack([backbone.preprocess(item.open()) for item in supports[0].items])
    with torch.no_grad():
        features = [model.backbone_.encode_images(pixels) for model in models]
        for model, found in zip(models, features, strict=True):
            assert torch.equal(found, model.backbone_.copy().encode_images(pixels))
    assert all(not torch.equal(features[0], other) for other in features[1:])


def test_low_rank_weights_on_low_rank_weights(backbone, tmp_path):
    """An adapted backbone is adapted again, by any method, and computes what a copy with plain weights does."""
    first = quick("clip-lora").fit(backbone, colours(2, seed=1))
    plain = first.backbone_.copy()
    support, queries = colours(2, seed=2), colours(2, seed=3)
    for key in ("clip-lora", "fine-tune", "saft", "vl-adapter"):
        ours, theirs = (quick(key).fit(one, support) for one in (first.backbone_, plain))
        assert ours.trained_parameters == theirs.trained_parameters
        assert all(torch.equal(tensor, theirs.update_[name]) for name, tensor in ours.update_.items()), key
        np.testing.assert_array_equal(ours.predict_proba(queries), theirs.predict_proba(queries))
        again = load(ours.save(tmp_path / key), first.backbone_)
        np.testing.assert_array_equal(again.predict_proba(queries), ours.predict_proba(queries))


def test_unknown_part(backbone):
    with pytest.raises(ClipadaptError, match="Unknown part of a tower 'top'"):
        create("clip-lora", layers="top").fit(backbone, colours(2, seed=1))
