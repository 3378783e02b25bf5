"""The protocol of adversarial images: the figures are those of the attack itself; what has no gradient is skipped."""

from __future__ import annotations

import pytest
import torch

from clipadapt.backbones import load_backbone
from clipadapt.backbones.published import PublishedFeatures
from clipadapt.data import Dataset, Split
from clipadapt.data.items import FeatureItem
from clipadapt.errors import ClipadaptError
from clipadapt.evaluation.protocol import NotApplicable, options, protocol
from clipadapt.evaluation.protocols import adversarial
from clipadapt.evaluation.robustness import NotAttackable, adversarial_accuracy
from clipadapt.methods import create
from tests.images import colours
from tests.tiny import tiny_clip


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


@pytest.fixture(scope="module")
def split() -> Split:
    return Split(colours(6, seed=1), colours(2, seed=2), colours(5, seed=3))


def run(backbone, split, method="linear-probe", **more):
    return protocol("adversarial")(create(method), backbone, split, 1, **{"shots": 4, "steps": 4, **more})


def test_options():
    assert options("adversarial") == {"shots": 16, "eps": (1.0, 2.0, 4.0), "steps": 20, "limit": None}


def test_figures_are_those_of_the_attack(backbone, split):
    found = run(backbone, split, eps=[64, 2])
    plain = create("linear-probe").fit(backbone, split.train.few_shot(4, seed=1))
    expected = adversarial_accuracy(plain, split.test, eps=[64, 2], steps=4)
    assert found.figures["accuracy"] == expected.clean
    assert found.details["attacked"] == {"64": expected.attacked[64.0], "2": expected.attacked[2.0]}
    assert found.figures["attacked"] == expected.attacked[64.0] < expected.clean
    few = run(backbone, split, "zero-shot", eps=64, limit=1)
    assert few.figures["accuracy"] == few.model.score(split.test.few_shot(1, seed=1))


def test_what_cannot_be_attacked_is_skipped(backbone, split, monkeypatch):
    names = split.test.class_names
    features = Dataset([FeatureItem(str(i), row) for i, row in enumerate(torch.eye(4))], [0, 1, 2, 3], names)
    published = PublishedFeatures("points", dict(zip(names, torch.eye(4), strict=True)))
    with pytest.raises(NotApplicable, match="points has no image tower"):
        run(published, Split(features, features, features))
    with pytest.raises(ClipadaptError, match="must be at least") as mistake:
        run(backbone, split, steps=0)
    assert not isinstance(mistake.value, NotApplicable), "a wrong option is a mistake, not a reason to skip"

    def refuses(*args, **kwargs):
        raise NotAttackable("It predicts in a way of its own.")

    monkeypatch.setattr(adversarial, "adversarial_accuracy", refuses)
    with pytest.raises(NotApplicable, match="way of its own"):
        run(backbone, split)
