"""Protocols on published features: who learns what, and that the figures are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from clipadapt.backbones.published import PublishedFeatures
from clipadapt.data import Dataset, Split
from clipadapt.data.items import FeatureItem
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.evaluation.protocol import NotApplicable, figures_of, options, protocol, protocols
from clipadapt.evaluation.protocols.label_noise import with_wrong_labels
from clipadapt.evaluation.protocols.long_tailed import long_tail
from clipadapt.evaluation.protocols.out_of_distribution import auroc, fpr95
from clipadapt.methods import create

NAMES = [f"class {i}" for i in range(6)]


@pytest.fixture(scope="module")
def world() -> tuple[PublishedFeatures, Split]:
    """Six classes of points; texts are near the classes' centres, not at them."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 16, generator=generator)
    texts = centres + 0.8 * torch.randn(6, 16, generator=generator)

    def part(n: int) -> Dataset:
        labels = [c for c in range(6) for _ in range(n)]
        x = normalize(centres[labels] + 0.9 * torch.randn(6 * n, 16, generator=generator), dim=1)
        domains = ["even" if i % 2 == 0 else "odd" for i in range(6 * n)]
        return Dataset([FeatureItem(str(i), row) for i, row in enumerate(x)], labels, NAMES, domains)

    return PublishedFeatures("points", dict(zip(NAMES, texts, strict=True)), 20.0), Split(part(40), part(10), part(30))


def run(key, world, method, seed=1, **more):
    return protocol(key)(create(method), *world, seed, **more)


def test_all_are_found_with_their_options():
    assert {"few-shot", "base-to-new", "domains", "transductive", "label-noise", "long-tailed"} <= set(protocols())
    assert options("few-shot") == {"shots": 16, "val": False, "search": False, "choose": None}
    assert all(protocol(key).__doc__ for key in protocols()), "each says what its options mean"
    with pytest.raises(ClipadaptError, match="few-shot"):
        protocol("few-shots")


def test_few_shot(world):
    backbone, split = world
    found = run("few-shot", world, "gda-clip", shots=8)
    plain = create("gda-clip").fit(backbone, split.train.few_shot(8, seed=1))
    assert found.figures["accuracy"] == plain.score(split.test)
    assert np.mean(list(found.per_class.values())) == pytest.approx(found.figures["macro"])
    assert found.figures["accuracy"] > run("few-shot", world, "zero-shot").figures["accuracy"]
    searched = run("few-shot", world, "gda-clip", shots=8, search=True)
    assert searched.details["searched"]["alpha"] in create("gda-clip").search_space["alpha"]
    assert (
        run("few-shot", world, "gda-clip", shots=4, val=True).model.alpha_ in create("gda-clip").search_space["alpha"]
    )
    with pytest.raises(NotApplicable, match="coop needs a backbone with"):
        run("few-shot", world, "coop")


def test_figures_of_logits(world):
    test = world[1].test
    perfect = 50 * torch.eye(6)[torch.tensor(test.labels)]
    figures, classes, details = figures_of(perfect, test)
    assert (figures["accuracy"], figures["macro"], figures["aurc"]) == (1, 1, 0)
    assert figures["ece"] == pytest.approx(0, abs=1e-6)
    assert set(classes.values()) == {1.0}
    assert sum(b["pictures"] for b in details["reliability"]) == len(test)


def test_domains(world):
    found = run("domains", world, "tip-adapter", learned=["even"])
    both = found.details["by_domain"]
    assert (found.figures["seen"], found.figures["unseen"]) == (both["even"], both["odd"])
    assert "unseen" not in run("domains", world, "zero-shot").figures
    with pytest.raises(DataError, match="no domain 'evn'"):
        run("domains", world, "tip-adapter", learned=["evn"])


def test_label_noise_hits(world):
    support = world[1].train.few_shot(10, seed=1)
    wrong = np.array(with_wrong_labels(support, 0.3, 1).labels) != np.array(support.labels)
    assert wrong.sum() == 18
    assert with_wrong_labels(support, 0.0, 1).labels == support.labels
    clean, noisy = (run("label-noise", world, "gda-clip", noise=share).figures["accuracy"] for share in (0.0, 0.8))
    assert noisy < clean


def test_long_tail_counts(world):
    support = long_tail(world[1].train, 32, 16.0, 1)
    assert sorted(support.counts, reverse=True) == [32, 18, 11, 6, 3, 2]
    found = run("long-tailed", world, "tip-adapter")
    assert {"many", "medium", "few"} <= found.figures.keys()
    assert found.figures["macro"] == pytest.approx(np.mean([found.figures[k] for k in ("many", "medium", "few")]))


def test_transductive_and_name_only_skip_what_cannot(world):
    with pytest.raises(NotApplicable, match="learns from labelled images"):
        run("transductive", world, "tip-adapter")
    with pytest.raises(NotApplicable, match="learns from labelled images"):
        run("name-only", world, "tip-adapter")
    assert run("transductive", world, "tip-adapter", shots=4).figures["accuracy"] > 0.3
    assert run("name-only", world, "zero-shot").figures == run("transductive", world, "zero-shot").figures


def test_out_of_distribution(world):
    known, unknown = np.array([3.0, 4.0, 5.0, 6.0]), np.array([1.0, 2.0, 4.5])
    assert auroc(known, unknown) == pytest.approx(np.mean([k > u for k in known for u in unknown]))
    assert fpr95(known, unknown) == pytest.approx(1 / 3), "all four known pass from 3 on"
    found = run("out-of-distribution", world, "gda-clip")
    assert found.figures["auroc (probability)"] > 0.6


def test_base_to_new(world):
    found = run("base-to-new", world, "zero-shot")
    assert found.figures["harmonic"] == pytest.approx(2 / (1 / found.figures["base"] + 1 / found.figures["new"]))
    with pytest.raises(NotApplicable, match="cannot be applied to new classes"):
        run("base-to-new", world, "tip-adapter")


def test_published_features_refuse_what_they_lack(world):
    backbone, split = world
    with pytest.raises(ClipadaptError, match="no model to encode"):
        backbone.encode_texts(["a photo"])
    with pytest.raises(ClipadaptError, match="class 0"):
        backbone.encode_classes(["class 00"])
    other = PublishedFeatures("points", {n: backbone.encode_classes([n])[0] for n in NAMES[:5]}, 20.0)
    assert other.fingerprint != backbone.fingerprint
    model = create("tip-adapter").fit(backbone, split.train.few_shot(2))
    assert model.origin_["source"] == "points"
