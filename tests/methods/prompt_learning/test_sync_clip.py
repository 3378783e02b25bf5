"""SYNC-CLIP: its terms by plain computation, which tokens they reach, what images are drawn, and what it gains."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import clipadapt
from clipadapt.backbones import Insertion, load_backbone
from clipadapt.data import Dataset
from clipadapt.data.playground.drawing import HELDOUT_STYLE, Playground
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.methods import TrainingData, create
from clipadapt.methods.artifact import recipe
from clipadapt.methods.prompt_learning.sync_clip import DomainPrompts, TwoDomains, alignment
from clipadapt.sources.images import as_image_source
from tests.images import colours
from tests.tiny import tiny_clip

SMALL = {"n_ctx": 2, "init": None, "depth": 2, "epochs": 2, "batch_size": 4, "min_scale": 1.0, "lr": 0.01}
NAMES = ["red", "green", "blue", "yellow"]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


@pytest.fixture(scope="module")
def generated() -> Dataset:
    """Noisier images of the four colours, two of each, under class names in another order."""
    data = colours(2, seed=5, noise=60)
    order = [3, 1, 0, 2]
    labels = [order.index(label) for label in data.labels]
    return dataclasses.replace(data, labels=labels, class_names=[NAMES[c] for c in order], name="made")


def learner_of(backbone, seed: int = 0, **settings) -> DomainPrompts:
    torch.manual_seed(seed)
    learner = create("sync-clip", **{**SMALL, "n_domain": 1, "n_visual": 3, **settings}).bind(backbone, NAMES)
    for parameter in learner.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return learner


def batches_of(backbone, support: Dataset, synthetic: Dataset):
    """What gives the method's batches, from rows and epoch."""
    method = create("sync-clip", **SMALL, synthetic=synthetic)
    return method._batches(backbone, method._prepare(backbone, TrainingData(support, class_names=support.class_names)))


def batch_of(backbone) -> TwoDomains:
    """Four real images of three classes; generated ones of three of them, and one of yellow."""
    real, made = colours(2, seed=1), colours(2, seed=5, noise=60)
    rows, chosen = [0, 1, 2, 4], [1, 0, 4, 6]
    pixels = [
        torch.stack([backbone.preprocess(d.items[i].open()) for i in k]) for d, k in ((real, rows), (made, chosen))
    ]
    labels, made_labels = torch.tensor([real.labels[i] for i in rows]), torch.tensor([made.labels[i] for i in chosen])
    return TwoDomains(torch.tensor(rows), labels, None, pixels[0], pixels[1], made_labels, torch.tensor([0, 1, 3]))


def test_alignment_by_plain_loops():
    torch.manual_seed(0)
    made, real = torch.randn(3, 6), torch.randn(4, 6)
    pairs, labels = [2, 0, 1], [0, 1, 0, 1]
    total = 0.0
    for i, partner in enumerate(pairs):
        distances = [sum(abs(made[i, d].item() - real[j, d].item()) for d in range(6)) / 6 for j in range(4)]
        nearest = min(distances[j] for j in range(4) if labels[j] != labels[partner])
        total += distances[partner] + max(0.0, distances[partner] - nearest)
    got = alignment(made, real, torch.tensor(pairs), torch.tensor(labels))
    assert got.item() == pytest.approx(total / 3, rel=1e-5)


def test_alignment_without_another_class_is_the_distance():
    torch.manual_seed(0)
    made, real = torch.randn(2, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    got = alignment(made, real, torch.tensor([0, 1]), torch.tensor([1, 1]))
    torch.testing.assert_close(got, (made - real).abs().mean())
    got.backward()
    assert torch.isfinite(made.grad).all()
    torch.testing.assert_close(made.grad, -real.grad)


def test_terms_by_plain_computation(backbone):
    """Images one at a time, tokens put together by hand, sums in plain numbers."""
    learner, batch = learner_of(backbone, made_weight=0.7, align_weight=0.3), batch_of(backbone)
    learner.shown = torch.tensor([True, True, True, False])

    def feature(pixels, tokens):
        insertions = [Insertion(tokens[0], at=-3, mode="insert"), Insertion(tokens[1], at=-3, layer=1)]
        with backbone.inserted(vision=insertions):
            return backbone.encode_images(pixels[None], normalize=False)[0]

    with torch.no_grad():
        ours = [learner.visual[0], learner.visual[1]]
        others = [torch.cat([learner.generated[j], learner.visual[j][1:]]) for j in range(2)]
        real = torch.stack([feature(p, ours) for p in batch.pixels])
        made = torch.stack([feature(p, others) for p in batch.made])
        texts = learner.texts()
        terms, logits = learner.terms(batch)

        def surprise(x, label, classes):
            scores = np.array([backbone.logit_scale * (x / x.norm() @ texts[c]).item() for c in classes])
            return np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[classes.index(label)]

        expected = {
            "real": np.mean([surprise(x, y, [0, 1, 2]) for x, y in zip(real, batch.labels.tolist(), strict=True)]),
            "generated": 0.7
            * np.mean([surprise(made[i], batch.made_labels[i].item(), [0, 1, 2, 3]) for i in range(3)]),
            "new": 0.7 * surprise(made[3], 3, [0, 1, 2, 3]),
            "align": 0.3 * alignment(made[:3], real, batch.pairs, batch.labels).item(),
        }
        assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-4)
        loss, right = learner.loss(batch)
    assert loss.item() == pytest.approx(sum(expected.values()), rel=1e-4)
    assert right.tolist() == (normalize(real, dim=1) @ texts[:3].T).argmax(1).eq(batch.labels).tolist()
    assert (logits[:, 3] == -torch.inf).all(), "a class without real images is no choice for a real image"


REACHED = {
    "real": {"text", "shared", "real"},
    "generated": {"text", "shared", "generated"},
    "new": {"text", "shared", "generated"},
    "align": {"shared", "real", "generated"},
}


@pytest.mark.parametrize("term", REACHED)
def test_which_tokens_a_term_reaches(backbone, term):
    learner = learner_of(backbone)
    parts = [*learner.textual, *learner.visual, *learner.generated]
    gradients = torch.autograd.grad(learner.terms(batch_of(backbone))[0][term], parts, allow_unused=True)
    text, visual, made = gradients[:2], gradients[2:4], gradients[4:]
    groups = {
        "text": text,
        "real": [None if g is None else g[:1] for g in visual],
        "shared": [None if g is None else g[1:] for g in visual],
        "generated": made,
    }
    reached = {name for name, group in groups.items() if all(g is not None and g.abs().max() > 0 for g in group)}
    untouched = {name for name, group in groups.items() if all(g is None or g.abs().max() == 0 for g in group)}
    assert reached == REACHED[term]
    assert untouched == groups.keys() - REACHED[term]


def test_domains_differ_in_their_first_tokens_only(backbone):
    pixels = batch_of(backbone).pixels
    with torch.no_grad():
        one = learner_of(backbone, n_domain=0)
        torch.testing.assert_close(one.features(pixels, one.generated_vision()), one.features(pixels, one.vision()))
        two = learner_of(backbone, n_domain=2)
        for ours, others in zip(two.vision(), two.generated_vision(), strict=True):
            assert ours.tokens.shape == others.tokens.shape == (3, 32)
            assert (ours.at, ours.layer, ours.mode) == (others.at, others.layer, others.mode)
            torch.testing.assert_close(ours.tokens[2:], others.tokens[2:])
            assert (ours.tokens[:2] != others.tokens[:2]).all()
        before = two.images(pixels)
        for parameter in two.generated:
            parameter.add_(1.0)
        torch.testing.assert_close(two.images(pixels), before)  # predictions know the real domain's tokens only
    with pytest.raises(ClipadaptError, match="sync-clip: n_domain = 5 of n_visual = 4"):
        create("sync-clip", **SMALL, n_domain=5).fit(backbone, colours(1, seed=1))


def test_without_a_source_it_is_ivlp(backbone):
    support, queries = colours(3, seed=1), colours(2, seed=2)
    ivlp = create("ivlp", **SMALL, n_visual=4).fit(backbone, support)
    model = create("sync-clip", **SMALL).fit(backbone, support)
    np.testing.assert_array_equal(model.predict_proba(queries), ivlp.predict_proba(queries))


def test_without_weight_the_source_changes_nothing(backbone, generated):
    support, queries = colours(3, seed=1), colours(2, seed=2)
    plain = create("sync-clip", **SMALL).fit(backbone, support)
    model = create("sync-clip", **SMALL, synthetic=generated, made_weight=0, align_weight=0).fit(backbone, support)
    np.testing.assert_allclose(model.predict_proba(queries), plain.predict_proba(queries), atol=1e-6)
    louder = create("sync-clip", **SMALL, synthetic=generated).fit(backbone, support)
    assert np.abs(louder.predict_proba(queries) - plain.predict_proba(queries)).max() > 1e-4


def test_what_is_drawn_for_a_batch(backbone, generated):
    """For each real image one of its class and one of a class without real images, the same in every run."""
    support = colours(3, seed=1).select(range(6))  # red and green; blue and yellow are new
    rows = torch.tensor([5, 0, 3])
    draw = batches_of(backbone, support, generated)
    batch = draw(rows, 0)
    assert batch.rows.tolist() == [5, 0, 3]
    assert batch.labels.tolist() == [1, 0, 1]
    assert batch.pairs.tolist() == [0, 1, 2]
    assert batch.made.shape == (6, 3, 32, 32)
    assert batch.made_labels[:3].tolist() == [1, 0, 1]
    images = {
        (generated.class_names[label], round(backbone.preprocess(item.open()).sum().item(), 3))
        for item, label in zip(generated.items, generated.labels, strict=True)
    }
    seen: set[tuple[str, float]] = set()
    for epoch in range(12):
        batch = draw(rows, epoch)
        assert set(batch.made_labels[3:].tolist()) <= {2, 3}
        seen |= {
            (NAMES[label], round(p.sum().item(), 3))
            for p, label in zip(batch.made, batch.made_labels.tolist(), strict=True)
        }
    assert seen == images, "all are used in time, each under its own name"
    again = batches_of(backbone, support, generated)(rows, 11)
    torch.testing.assert_close(again.made, batch.made)


def test_a_source_may_lack_classes(backbone, generated):
    support = colours(3, seed=1).select(range(9))  # red, green and blue
    rows = torch.tensor([0, 3, 6])
    new = batches_of(backbone, support, generated.only(["yellow"]))(rows, 0)
    assert new.pairs.tolist() == []
    assert new.made_labels.tolist() == [3, 3, 3]
    assert set(learner_of(backbone).terms(new)[0]) == {"real", "new"}
    some = batches_of(backbone, support, generated.only(["blue", "red"]))
    batch = some(rows, 0)
    assert batch.pairs.tolist() == [0, 2]
    assert batch.made_labels.tolist() == [0, 2]
    assert set(learner_of(backbone).terms(batch)[0]) == {"real", "generated", "align"}
    assert not isinstance(some(torch.tensor([3]), 0), TwoDomains)
    learner_of(backbone).loss(some(torch.tensor([3]), 0))[0].backward()


def test_names_of_all_sources_are_classes(backbone, generated, tmp_path):
    support = colours(2, seed=1).only(["blue", "red"])
    queries = colours(2, seed=2)
    model = create("sync-clip", **SMALL, synthetic=generated, new_classes=["dog", "red"]).fit(backbone, support)
    assert model.class_names_ == ["blue", "red", "dog", "yellow", "green"]
    assert model.predict_proba(queries).shape == (8, 5)
    # a data set is remembered by its name
    loaded = clipadapt.load(model.save(tmp_path / "model"), backbone)
    assert recipe(loaded) == recipe(model)
    assert loaded.synthetic == "made"
    np.testing.assert_allclose(loaded.predict_proba(queries), model.predict_proba(queries), atol=1e-6)
    with pytest.raises(DataError, match="made does not exist"):
        loaded.fit(backbone, support)
    # the same images as a folder
    for item, label in zip(generated.items, generated.labels, strict=True):
        folder = tmp_path / "folder" / generated.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        item.open().save(folder / f"{len(list(folder.iterdir()))}.png")
    again = create("sync-clip", **SMALL, synthetic=tmp_path / "folder", new_classes=["dog"]).fit(backbone, support)
    assert set(again.class_names_) == set(model.class_names_)
    order = [again.class_names_.index(name) for name in model.class_names_]
    np.testing.assert_allclose(again.predict_proba(queries)[:, order], model.predict_proba(queries), atol=2e-3)


def test_the_playground_draws_what_it_knows(backbone):
    names = ["star", "house"]
    support = Playground(size=32, kinds=tuple(names), seed=1).dataset(2)
    method = create("sync-clip", **SMALL, synthetic="playground", per_class=3, new_classes=["circle"])
    source = as_image_source("playground", backbone)([*names, "circle"], 3, method.seed)
    assert source.counts == [3, 3, 3]
    assert source.class_names == ["circle", "house", "star"]
    assert method.fit(backbone, support).class_names_ == [*names, "circle"]
    drawn = {item.digest() for item in source.items}
    for seed in range(5):
        theirs = Playground(size=32, kinds=tuple(source.class_names), seed=seed).dataset(3)
        assert drawn.isdisjoint(item.digest() for item in theirs.items), "never the images of somebody's data set"
    with pytest.raises(ClipadaptError, match=r"the playground cannot draw 'red', 'blue', 'dog'; it draws .*star"):
        create("sync-clip", synthetic="playground", new_classes=["dog"]).fit(
            backbone, colours(2, seed=1).only(["red", "blue"])
        )


def test_a_run_is_resumed_with_the_same_source_only(backbone, generated):
    support = colours(2, seed=1)

    def identity(source: Dataset) -> str:
        method = create("sync-clip", synthetic=source)
        data = method._prepare(backbone, TrainingData(support, class_names=support.class_names))
        return method._identity(backbone, data)

    assert identity(generated) == identity(generated)
    assert identity(generated.select(range(5))) != identity(generated)


@pytest.mark.claim("sync-clip", "sketches of eight kinds: generated images of eight others make these known")
def test_generated_images_of_new_classes_make_them_known():
    """Sketches, a style new to the model, of eight kinds; of eight others there are only drawings in all styles."""
    backbone = load_backbone()
    base = ("snail", "magnifying glass", "drop", "clock", "bus", "flower", "triangle", "cloud")
    new = ("oval", "leaf", "carrot", "bird", "anchor", "ladder", "spiral", "apple")
    support = Playground(size=48, kinds=base, styles=(HELDOUT_STYLE,), seed=1).dataset(8)
    test = Playground(size=48, kinds=new, styles=(HELDOUT_STYLE,), seed=101).dataset(10)
    settings = {"new_classes": list(new), "per_class": 8, "lr": 0.02, "min_scale": 1.0}
    real_only = create("sync-clip", **settings).fit(backbone, support).score(test)
    model = create("sync-clip", **settings, synthetic="playground").fit(backbone, support)
    assert model.score(test) > real_only + 0.05
