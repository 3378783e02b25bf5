"""The base-to-new protocol: the published order of sampling, who is told from whom, and both ways to average."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.data import Dataset, image_list
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.evaluation.protocols.base_to_new import (
    average_of_harmonics,
    base_support,
    base_to_new,
    harmonic,
    harmonic_of_averages,
)
from clipadapt.methods import create
from clipadapt.methods.card import Card
from clipadapt.methods.kinds.features import FeatureMethod
from clipadapt.methods.tasks.classification import Classifier
from tests.images import colours
from tests.tiny import tiny_clip


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(tiny_clip())


@dataclass(kw_only=True)
class Always(FeatureMethod, Classifier):
    """Takes everything for one class, and remembers what it was fitted on."""

    answer: int = 0

    card = Card("always", "", None, "", "", "nothing", "labels", new_classes=True)

    def _learn(self, model, data, run):
        self.support_ = data.support

    def _logits(self, images):
        return torch.eye(len(self.class_names_))[self.answer].expand(len(images), -1)


# -- harmonic means --------------------------------------------------------------------------------------------------


def test_harmonic_mean():
    assert harmonic(0.5, 0.5) == 0.5
    assert harmonic(1.0, 0.5) == pytest.approx(2 / 3)
    assert harmonic(60.0, 40.0) == pytest.approx(48.0)
    assert harmonic(0.0, 0.9) == 0.0 == harmonic(0.0, 0.0)


def test_two_ways_to_average():
    results = [(0.8, 0.4), (0.4, 0.8)]
    assert harmonic_of_averages(results) == pytest.approx(0.6)
    assert average_of_harmonics(results) == pytest.approx(2 * 0.8 * 0.4 / 1.2)
    assert harmonic_of_averages(results[:1]) == average_of_harmonics(results[:1]) == harmonic(*results[0])


def test_both_published_figures_of_gda():
    # Base and new accuracy on the eleven data sets, ViT-B/16, as logs/base2new.log of mrflogs/ICLR24 has them.
    base = [98.04, 94.1, 78.71, 97.78, 90.63, 45.88, 81.95, 80.63, 93.28, 86.63, 75.95]
    new = [94.51, 97.15, 66.92, 72.46, 91.21, 34.09, 75.62, 59.82, 79.21, 79.09, 69.79]
    results = list(zip(base, new, strict=True))
    assert average_of_harmonics(results) == pytest.approx(78.72, abs=0.005)
    assert harmonic_of_averages(results) == pytest.approx(78.97, abs=0.01)


# -- sampling --------------------------------------------------------------------------------------------------------


def numbered(labels: list[int], classes: int) -> Dataset:
    """Blank images; a name of `names` says where each stands in `labels`."""
    images = np.zeros((len(labels), 8, 8, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(len(labels))
    return image_list(images, labels, [f"class {c}" for c in range(classes)])


def where(data: Dataset) -> list[int]:
    return [int(np.asarray(item.open())[0, 0, 0]) for item in data.items]


def test_shots_are_sampled_over_all_classes_before_the_new_ones_go():
    labels = [3, 1, 0, 2, 4] * 6  # new classes come first, so they take their part of the random stream
    train = numbered(labels, 5)
    rng = random.Random(7)
    chosen = {c: rng.sample([i for i, label in enumerate(labels) if label == c], 2) for c in (3, 1, 0, 2, 4)}
    support = base_support(train, 2, seed=7)
    assert where(support) == [*chosen[1], *chosen[0], *chosen[2]]  # classes in order of appearance; base: 0, 1, 2
    assert support.labels == [1, 1, 0, 0, 2, 2]
    assert support.class_names == ["class 0", "class 1", "class 2"]
    assert where(support) != where(train.base_new_split()[0].few_shot(2, seed=7))


def test_the_method_learns_from_that_sample(backbone):
    labels = [3, 1, 0, 2] * 6
    train = numbered(labels, 4)
    result = base_to_new(Always(), backbone, train, train, shots=2, seed=3)
    assert where(result.support) == where(base_support(train, 2, seed=3))
    assert result.model.support_ is result.support
    assert result.model.class_names_ == ["class 0", "class 1"]


# -- judging ---------------------------------------------------------------------------------------------------------


def test_accuracies_are_those_within_each_half(backbone):
    test = numbered([0] * 3 + [1] * 1 + [2] * 2 + [3] * 4 + [4] * 4, 5)  # base: 0, 1, 2; new: 3, 4
    results = [base_to_new(Always(answer=a), backbone, test, test, shots=1) for a in (0, 1)]
    assert [r.base for r in results] == [3 / 6, 1 / 6]
    assert [r.new for r in results] == [4 / 8, 4 / 8]
    assert results[0].harmonic == 0.5
    assert results[1].harmonic == pytest.approx(0.25)
    assert results[0].seconds >= 0


def test_zero_shot_recomputed(backbone):
    train, test = colours(4, seed=1, noise=90), colours(20, seed=2, noise=90)
    result = base_to_new("zero-shot", backbone, train, test, shots=2)
    pixels = torch.stack([backbone.preprocess(item.open()) for item in test.items])
    texts = backbone.encode_texts([f"a photo of a {name}." for name in ("red", "green", "blue", "yellow")])
    similarity, labels = backbone.encode_images(pixels) @ texts.T, torch.tensor(test.labels)
    old, new = labels < 2, labels >= 2
    assert result.base == pytest.approx((similarity[old, :2].argmax(1) == labels[old]).float().mean().item())
    assert result.new == pytest.approx((similarity[new, 2:].argmax(1) + 2 == labels[new]).float().mean().item())


def test_new_names_that_a_method_was_told_of_stay_out_of_the_base_accuracy(backbone):
    @dataclass(kw_only=True)
    class Told(Always):
        def _learn(self, model, data, run):
            self.class_names_ = [*data.support.class_names, "class 2", "class 3"]

        def _logits(self, images):
            return torch.arange(len(self.class_names_), dtype=torch.float).expand(len(images), -1)

    test = numbered([0, 1, 1, 2, 3, 3, 3], 4)
    result = base_to_new(Told(), backbone, test, test, shots=1)
    assert (result.base, result.new) == (2 / 3, 3 / 4)


def test_names_that_recur_are_different_classes(backbone):
    test = numbered([0, 1, 2, 3], 4)
    test = Dataset(test.items, test.labels, ["crane", "crane", "a", "b"])
    assert base_to_new(Always(answer=1), backbone, test, test, shots=1).base == 0.5


def test_a_method_that_learns_prompts(backbone):
    train, test = colours(4, seed=1), colours(4, seed=2)
    method = create("coop", n_ctx=2, epochs=2)
    result = base_to_new(method, backbone, train, test, shots=2)
    again = create("coop", n_ctx=2, epochs=2).fit(backbone, base_support(train, 2, seed=1))
    base, new = test.base_new_split()
    assert result.base == again.score(base)
    assert result.new == again.with_classes(["blue", "yellow"]).score(new)
    assert not hasattr(method, "backbone_")  # what was given stays unfitted
    assert result.model.trained_parameters == 2 * backbone.width("text")


# -- what cannot work ------------------------------------------------------------------------------------------------


def test_a_method_bound_to_its_classes_is_refused(backbone):
    data = colours(2, seed=1)
    with pytest.raises(ClipadaptError, match="tip-adapter cannot be applied to new classes"):
        base_to_new("tip-adapter", backbone, data, data, shots=1)


def test_parts_that_do_not_fit(backbone):
    data = colours(2, seed=1)
    for names, match in (
        (["green", "red", "blue", "yellow"], "same classes in the same order"),
        (["red", "green", "blue"], "same classes"),
    ):
        with pytest.raises(DataError, match=match):
            base_to_new("zero-shot", backbone, data, data.only(names), shots=1)
    few = data.only(["red", "green", "blue"])
    with pytest.raises(DataError, match="at least 4 classes, not 3"):
        base_to_new("zero-shot", backbone, few, few, shots=1)
    with pytest.raises(DataError, match="no image of the new classes"):
        base_to_new("zero-shot", backbone, data, data.select(range(4)), shots=1)
