"""Adversarial accuracy: what an attack written out finds, for every kind of method; what cannot be attacked says so."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from clipadapt.backbones import load_backbone
from clipadapt.errors import ClipadaptError
from clipadapt.evaluation.robustness import adversarial_accuracy
from clipadapt.methods import create
from clipadapt.training.attacks import LEVEL, PixelSpace, pgd
from tests.images import colours
from tests.tiny import tiny_clip


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


@pytest.fixture(scope="module")
def queries():
    return colours(5, seed=7)


def fitted(backbone, key: str, **settings):
    return create(key, **settings).fit(backbone, colours(4, seed=1))


METHODS = {
    "linear-probe": {},  # a head on frozen features
    "tip-adapter": {},  # a cache
    "fine-tune": {"epochs": 8, "lr": 1e-3, "min_scale": 1.0},  # another tower
    "coop": {"n_ctx": 2, "epochs": 5},  # texts
    "vpt": {"n_ctx": 2, "epochs": 5},  # tokens in the image tower
}


@pytest.mark.parametrize("key", METHODS)
def test_every_kind_of_method(backbone, queries, key):
    model = fitted(backbone, key, **METHODS[key])
    found = adversarial_accuracy(model, queries, eps=(0, 2, 64), steps=5)
    assert found.clean == model.score(queries)
    assert list(found.attacked) == [0.0, 2.0, 64.0]
    assert found.attacked[0.0] == found.clean
    assert found.attacked[64.0] < found.clean
    assert found.attacked[64.0] <= found.attacked[2.0] <= found.clean


def test_equals_an_attack_written_out(backbone, queries):
    model = fitted(backbone, "fine-tune", **METHODS["fine-tune"])
    space = PixelSpace.of(backbone)
    plain = space.plain(torch.stack([backbone.preprocess(item.open()) for item in queries.items]))
    labels = torch.tensor(queries.labels)

    def scores(x):
        return model.backbone_.encode_images(space.pixels(x)) @ model.weight_.T

    right = scores(plain).argmax(1) == labels
    plain, labels = plain[right], labels[right]
    generator = torch.Generator().manual_seed(3)
    attacked = pgd(scores, plain, labels, eps=8 * LEVEL, step_size=2 * LEVEL, steps=6, generator=generator)
    expected = int((scores(attacked).argmax(1) == labels).sum()) / len(queries)
    found = adversarial_accuracy(model, queries, eps=[8], steps=6, step_size=2, seed=3)
    assert found.attacked == {8.0: expected}
    assert found.clean == right.float().mean().item()


def test_classes_are_matched_by_name(backbone, queries):
    model = fitted(backbone, "linear-probe")
    shuffled = queries.only(["yellow", "red"])
    assert adversarial_accuracy(model, shuffled, eps=[0]).clean == model.score(shuffled)
    with pytest.raises(ClipadaptError, match="class of this model"):
        adversarial_accuracy(model, queries.rename({"red": "rust"}))


def test_what_cannot_be_attacked(backbone, queries, monkeypatch):
    x = np.eye(3)
    with pytest.raises(ClipadaptError, match="no differentiable image tower"):
        adversarial_accuracy(create("zero-shot").fit_features(x, [0, 1, 2], x), queries)
    model = fitted(backbone, "zero-shot")
    for wrong in ({"eps": [-1]}, {"steps": 0}):
        with pytest.raises(ClipadaptError, match="must be at least"):
            adversarial_accuracy(model, queries, **wrong)
    with pytest.raises(ClipadaptError, match="Unknown attack 'fgsm'"):
        adversarial_accuracy(model, queries, attack="fgsm")
    with pytest.raises(ClipadaptError, match="labelled image"):
        adversarial_accuracy(model, queries.select([]))
    monkeypatch.setattr(model, "_logits", lambda images: (images @ model.weight_.T).detach())
    with pytest.raises(ClipadaptError, match="not differentiable"):
        adversarial_accuracy(model, queries)
    monkeypatch.setattr(type(model), "head", None)
    with pytest.raises(ClipadaptError, match="custom prediction path"):
        adversarial_accuracy(model, queries)


def test_auto_attack_is_optional(backbone, queries, monkeypatch):
    model = fitted(backbone, "linear-probe")
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(ClipadaptError, match="needs the package torchattacks"):
        adversarial_accuracy(model, queries, attack="autoattack")

    class Adversary:
        def __init__(self, model, norm, eps, n_classes, seed):
            assert (norm, n_classes) == ("Linf", 4)
            self.model, self.eps = model, eps
            assert next(model.parameters()).device.type == "cpu"

        def __call__(self, plain, labels):
            assert self.model(plain).shape == (len(plain), 4)
            return pgd(self.model, plain, labels, eps=self.eps, step_size=self.eps / 2, steps=4)

    monkeypatch.setitem(sys.modules, "torchattacks", types.SimpleNamespace(AutoAttack=Adversary))
    found = adversarial_accuracy(model, queries, eps=[64], attack="autoattack")
    assert found.attacked[64.0] < found.clean
    two = create("linear-probe").fit(backbone, colours(4, seed=1).only(["red", "blue"]))
    with pytest.raises(ClipadaptError, match="at least 4 classes"):
        adversarial_accuracy(two, queries.only(["red", "blue"]), attack="autoattack")
