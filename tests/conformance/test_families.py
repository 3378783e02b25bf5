"""Methods that reach into the towers do so in every family of backbones."""

from __future__ import annotations

import pytest

from clipadapt.backbones import load_backbone
from clipadapt.backbones.families import FAMILIES
from clipadapt.methods import create
from tests.images import colours
from tests.tiny import tiny

METHODS = {
    "coop": {"n_ctx": 2, "epochs": 12, "lr": 1e-3},
    "clip-lora": {"steps_per_shot": 4, "min_scale": 1.0, "lr": 1e-3, "dropout": 0.0},
    "fine-tune": {"epochs": 8, "lr": 1e-3, "min_scale": 1.0},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", METHODS)
def test_training_lowers_the_loss(family, key):
    backbone, losses = load_backbone(tiny(family)), []
    support = colours(2, seed=1)
    model = create(key, **METHODS[key]).fit(backbone, support, report=lambda step: losses.append(step["loss"]))
    assert losses[-1] < losses[0]
    assert model.predict(support).shape == (8,)
