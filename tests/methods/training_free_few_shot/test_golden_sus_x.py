"""TIP-X gives the figures of its official implementation, and its shortcuts those of the plain computation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize, one_hot

import clipadapt
from clipadapt.backbones import load_backbone
from clipadapt.data.playground.drawing import Playground
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_images
from clipadapt.methods import create
from clipadapt.methods.recipe import recipe
from clipadapt.nn.signatures import (
    common_range,
    divergence,
    divergence_classifier,
    log_signature,
    official_affinity,
    official_logits,
)
from clipadapt.sources.images import Retrieved
from clipadapt.training.cache_search import best_signature_cache, published_grid
from tests.images import colours
from tests.methods.test_golden_features import ENCODERS, Case, close
from tests.tiny import tiny_clip


class TipXCase(Case):
    """The rows that the golden page takes for TIP-X and CapS: 100 for validation, 600 for test."""

    def __init__(self, root, encoder: str, method: str) -> None:
        super().__init__(root, encoder, "s4_seed1", method)
        self.val, self.test = (torch.from_numpy(self[name]) for name in ("val_index", "test_index"))
        self.probe = torch.from_numpy(self["probe_rows"])  # positions in test
        self.values = one_hot(self.y[self.support], 19).float()

    def signatures(self, rows: torch.Tensor) -> torch.Tensor:
        return log_signature(self.x[rows], self.t, 0.5)


@pytest.fixture(params=ENCODERS)
def case(request, shared):
    return TipXCase(shared, request.param, "tip_x")


def test_divergences(case):
    keys = case.signatures(case.support)
    for part, rows in (("test", case.test), ("val", case.val)):
        kl = divergence(case.signatures(rows), keys)
        close([kl.min(), kl.max()], case[f"kl_{part}_minmax"], 1e-4)
    close(divergence(case.signatures(case.test[case.probe]), keys), case["kl_test64"], 1e-4)


def test_official_figures(case):
    """Range over the whole matrix, of the validation images' cosines; the search on a grid of 5 x 10 x 10."""
    s, val = case.x[case.support], case.x[case.val]
    affinity = val @ s.T
    low, high = float(affinity.min()), float(affinity.max())
    close([low, high], case["val_affinity_minmax"], 1e-6)
    keys = case.signatures(case.support)
    ours = official_affinity(divergence(case.signatures(case.test), keys), low, high, 100)
    close(ours[case.probe], case["affinities64"], 1e-4)
    close(ours[case.probe].float() @ case.values, case["kl_logits64"], 1e-4)
    x = case.x[case.test]
    summed = official_logits(case.signatures(case.test), keys, case.values, x @ s.T, 100, [low, high])
    close(summed[case.probe], case["kl_logits64"], 1e-4)
    kl_val = official_affinity(divergence(case.signatures(case.val), keys), low, high, 100).float() @ case.values
    best = best_signature_cache(
        100 * val @ case.t.T, [affinity], case.values, [kl_val], case.y[case.val], steps=(5, 10, 10)
    )
    alpha, beta, gamma = (float(case[name]) for name in ("alpha", "beta", "gamma"))
    assert best == pytest.approx((alpha, beta, gamma, 0))

    head = create("sus-x", alpha=alpha, beta=beta, gamma=gamma, scaling="official")
    head.fit_features(s, case.y[case.support], case.t, val=(val, case.y[case.val]))
    assert head.range_ == pytest.approx([low, high])
    head.alpha_, head.beta_, head.gamma_ = alpha, beta, gamma  # the class searches the whole published grid
    logits = head.logits(case.x[case.test])
    close(logits[case.probe], case["test_logits64"], 1e-4)
    assert case.accuracy(logits) == pytest.approx(float(case["test_acc"]), abs=0.2)
    val_logits = head.logits(val)
    assert 100 * (val_logits.argmax(1) == case.y[case.val]).double().mean() == pytest.approx(float(case["val_acc"]))


def test_official_rows_behind_the_last_full_hundred_count_as_zero():
    kl = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)).double() + 1
    ours = official_affinity(kl, 0.2, 0.7, batch=2)
    kept = torch.cat([kl[:4], torch.zeros(1, 3)])
    torch.testing.assert_close(ours, -(kept / kept.max() * 0.5 + 0.2))
    with pytest.raises(ClipadaptError, match="at least 9 different images"):
        official_affinity(kl, 0.2, 0.7, batch=9)


def test_divergence_is_the_plain_loop():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 6, generator=generator).double().log_softmax(1) for n in (4, 5))
    plain = [[sum(p.exp() * (p - q) for p, q in zip(x, y, strict=True)) for y in b] for x in a]
    torch.testing.assert_close(divergence(a, b), torch.tensor(plain))


def random_case(counts: list[int], seed: int = 0):
    """Random unit features: (support, labels, texts, queries)."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor([c for c, n in enumerate(counts) for _ in range(n)])
    centres = normalize(torch.randn(len(counts), 8, generator=generator), dim=1)
    x, t, q = (
        normalize(z + 0.3 * torch.randn(len(z), 8, generator=generator), dim=1)
        for z in (centres[y], centres, centres.repeat(3, 1))
    )
    return x, y, t, q


def test_the_classifier_is_the_sum_over_support_images():
    """With equally many images a class, its logits differ from the paper's sums by the same for all classes."""
    x, y, t, q = random_case([3, 3, 3, 3])
    keys, values = log_signature(x, t, 0.5), one_hot(y, 4).double()
    p = log_signature(q, t, 0.5)
    sums = -divergence(p, keys) @ values
    linear = p.exp() @ divergence_classifier(keys, values)
    torch.testing.assert_close(linear - linear[:, :1], sums - sums[:, :1])
    # and so do those of any mapping a + b * divergence
    mapped = -(0.3 + 2.0 * divergence(p, keys)) @ values
    torch.testing.assert_close(2 * (linear - linear[:, :1]), mapped - mapped[:, :1])


def test_how_many_images_a_class_has_does_not_matter():
    x, y, t, q = random_case([3, 3, 3, 3])
    p, keys, values = log_signature(q, t, 0.5), log_signature(x, t, 0.5), one_hot(y, 4).double()
    once = p.exp() @ divergence_classifier(keys, values)
    rows = [*range(12), 0, 1, 2, 0, 1, 2]  # class 0 three times over
    more = p.exp() @ divergence_classifier(keys[rows], values[rows])
    torch.testing.assert_close(more, once * (18 / 4) / 3)
    without = p.exp() @ divergence_classifier(keys[3:], values[3:])
    torch.testing.assert_close(without[:, 0], torch.zeros(12).double())
    torch.testing.assert_close(without[:, 1:].mean(1), torch.zeros(12).double())
    others = once[:, 1:] - once[:, 1:].mean(1, keepdim=True)
    torch.testing.assert_close(without[:, 1:], others)


def test_range_over_pairs_of_different_images():
    x, y, t, _ = random_case([2, 2, 1])
    keys = log_signature(x, t, 0.5)
    cosines, kl = [], []
    for i, j in product(range(5), repeat=2):
        if i != j:
            cosines.append(0.7 * float(x[i] @ x[j]) + 0.3 * float(x[i] @ t[y[j]]))
            kl.append(float((keys[i].exp() * (keys[i] - keys[j])).sum()))
    expected = (max(cosines) - min(cosines)) / (max(kl) - min(kl))
    assert common_range(keys, [(0.7, x, x), (0.3, x, t[y])]) == pytest.approx(expected, rel=1e-5)
    assert common_range(keys[:1], [(1.0, x[:1], x[:1])]) == 0
    assert common_range(keys[[0, 0]], [(1.0, x[[0, 0]], x[[0, 0]])]) == 0


def test_search_is_the_plain_search():
    """Against all settings of a smaller grid written out: the same one, the first of equals."""
    chosen = set()
    for seed in range(4):
        rng = np.random.default_rng(seed)
        affinity, zero_shot, kl_logits = (
            torch.from_numpy(scale * rng.standard_normal(shape))
            for scale, shape in ((0.3, (9, 6)), (5, (9, 3)), (1, (9, 3)))
        )
        values, labels = one_hot(torch.arange(6) % 3, 3).double(), torch.arange(9) % 3
        best, plain = -1, (0.0, 0.0, 0.0)
        for alpha, beta, gamma in product(*published_grid((4, 10, 12))):
            logits = zero_shot + kl_logits * gamma + alpha * torch.exp(-(beta - beta * affinity)) @ values
            right = int((logits.argmax(1) == labels).sum())
            if right > best:
                best, plain = right, (alpha, beta, gamma)
        ours = best_signature_cache(zero_shot, [affinity], values, [kl_logits], labels, steps=(4, 10, 12))
        assert ours == pytest.approx((*plain, 0))
        chosen.add(ours)
    assert len(chosen) > 1


def test_limits():
    x, y, t, q = random_case([3, 3, 3, 3])
    zero_shot = create("zero-shot").fit_features(x, y, t).logits(q)
    torch.testing.assert_close(create("sus-x", alpha=0, gamma=0).fit_features(x, y, t).logits(q), zero_shot)
    tip = create("tip-adapter").fit_features(x, y, t).logits(q)
    torch.testing.assert_close(create("sus-x", gamma=0).fit_features(x, y, t).logits(q), tip)


def test_a_prediction_depends_on_its_image_alone_by_default_only():
    x, y, t, _ = random_case([3, 3, 3, 3])
    q = random_case([60, 60, 60, 60], seed=3)[0]
    head = create("sus-x").fit_features(x, y, t)
    torch.testing.assert_close(head.logits(q)[:5], head.logits(q[:5]))
    official = create("sus-x", scaling="official").fit_features(x, y, t)
    assert (official.logits(q)[:5] - official.logits(q[:120])[:5]).abs().max() > 1e-4
    assert official.logits(q[:0]).shape == (0, 4)
    with pytest.raises(ClipadaptError, match="at least 100 different images"):
        official.logits(q[:99])


def test_official_and_default_agree_where_the_ranges_do():
    """With equally many images a class, only the ranges of cosines and divergences tell them apart."""
    x, y, t, _ = random_case([3, 3, 3, 3])
    q = random_case([50, 50, 50, 50], seed=3)[0]
    head = create("sus-x", alpha=0).fit_features(x, y, t)
    official = create("sus-x", alpha=0, scaling="official").fit_features(x, y, t)
    ours, theirs = (
        h.logits(q) - h.logits(q).mean(1, keepdim=True) - 100 * (q @ t.T - (q @ t.T).mean(1, keepdim=True))
        for h in (head, official)
    )
    ratio = (ours * theirs).sum() / (theirs * theirs).sum()
    torch.testing.assert_close(ours, ratio * theirs, atol=2e-4, rtol=1e-4)


def test_validation_chooses(case):
    head = create("sus-x").fit_features(
        case.x[case.support], case.y[case.support], case.t, val=(case.x[case.val], case.y[case.val])
    )
    alphas, betas, gammas = published_grid()
    assert head.alpha_ in alphas
    assert head.beta_ in betas
    assert head.gamma_ in gammas
    plain = create("sus-x").fit_features(case.x[case.support], case.y[case.support], case.t)
    right = [(h.logits(case.x[case.val]).argmax(1) == case.y[case.val]).sum() for h in (head, plain)]
    assert right[0] >= right[1]


# -- names only -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


def test_names_and_a_source_suffice(backbone, tmp_path):
    made, queries = colours(3, seed=5), colours(2, seed=2)
    names = made.class_names[::-1]
    model = create("sus-x", source=made).fit(backbone, class_names=names)
    assert model.class_names_ == names
    labelled = create("sus-x").fit(backbone, made.only(names))
    np.testing.assert_array_equal(model.predict_proba(queries), labelled.predict_proba(queries))
    loaded = clipadapt.load(model.save(tmp_path / "model"), backbone)
    assert loaded.source == made.name
    np.testing.assert_array_equal(loaded.predict_proba(queries), model.predict_proba(queries))
    # labelled images are added to those of the source
    both = create("sus-x", source=made).fit(backbone, colours(1, seed=1))
    assert both.keys_.shape == (16, backbone.dim)
    np.testing.assert_array_equal(both.values_.sum(0), [4, 4, 4, 4])


def test_what_a_source_is_asked_for(backbone):
    pool = colours(5, seed=5)
    source = Retrieved(pool.items)
    model = create("sus-x", source=source, per_class=2).fit(backbone, class_names=["red", "blue"])
    expected = Retrieved(pool.items, backbone=backbone)(["red", "blue"], 2, 1)
    assert torch.equal(model.keys_, encode_images(backbone, expected).features)
    assert recipe(model)["hyperparameters"]["source"] == "retrieved", "its name is what a saved model keeps"


def test_refused(backbone):
    made = colours(2, seed=5)
    with pytest.raises(ClipadaptError, match="learns from labelled images"):
        create("sus-x").fit(backbone, class_names=made.class_names)
    with pytest.raises(ClipadaptError, match=r"no image of 'teal'; it has images of 'blue', 'green', 'red', 'yell"):
        create("sus-x", source=made).fit(backbone, class_names=["red", "teal"])
    with pytest.raises(ClipadaptError, match="the playground cannot draw 'teal'"):
        create("sus-x", source="playground").fit(backbone, class_names=["star", "teal"])
    with pytest.raises(ClipadaptError, match=r"source needs fit\(backbone"):
        create("sus-x", source=made).fit_features(torch.zeros(0, 8), [], torch.eye(8)[:3])
    with pytest.raises(ClipadaptError, match="image source is a Dataset"):
        create("sus-x", source=3).fit(backbone, class_names=["red", "blue"])


@pytest.mark.claim("sus-x", "six unknown kinds of things, names alone: drawn images of them beat zero-shot")
def test_names_alone_beat_zero_shot(claim):
    """On kinds of things that the embedded model was not trained on; other drawings of them are the support."""
    backbone = load_backbone()
    names = ("anchor", "bell", "boat", "cactus", "hat", "key")
    tests = [Playground(size=48, kinds=names, seed=seed).dataset(15) for seed in (7, 8, 9)]
    zero_shot = create("zero-shot").fit(backbone, class_names=names)
    model = create("sus-x", source="playground").fit(backbone, class_names=names)
    scores = {name: [one.score(test) for test in tests] for name, one in (("sus-x", model), ("zero-shot", zero_shot))}
    claim(scores)
    assert np.mean(scores["sus-x"]) > np.mean(scores["zero-shot"]) + 0.05
