"""CapS-Adapter gives the figures of its official implementation; its recipe from captions to caches step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize, one_hot

import clipadapt
from clipadapt.backbones import load_backbone
from clipadapt.data import Dataset, ImageItem
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_classes, encode_images
from clipadapt.methods import create
from clipadapt.methods.recipe import recipe
from clipadapt.methods.training_free_few_shot.caps_adapter import DELTAS, mixed
from clipadapt.nn.signatures import divergence, official_affinity, official_logits
from clipadapt.training.cache_search import best_signature_cache, published_grid
from tests.images import colours
from tests.methods.test_golden_features import ENCODERS, close
from tests.methods.training_free_few_shot.test_golden_sus_x import TipXCase, random_case
from tests.tiny import tiny_clip


class CapsCase(TipXCase):
    """TIP-X's rows and the made-up caption features of the golden page."""

    def __init__(self, root, encoder: str) -> None:
        super().__init__(root, encoder, "caps_adapter")
        labels, t = self.y[self.support].numpy(), self.t.numpy().astype(np.float64)
        noise = np.random.default_rng(301).standard_normal((len(labels), t.shape[1]))
        captions = t[labels] + 0.5 * noise / np.sqrt(t.shape[1])
        captions /= np.linalg.norm(captions, axis=1, keepdims=True)
        self.captions = torch.from_numpy(captions.astype(np.float32))

    def channels(self, rows: torch.Tensor) -> torch.Tensor:
        return (2 * self.x[rows].double()).log_softmax(1)


@pytest.fixture(params=ENCODERS)
def case(request, shared):
    return CapsCase(shared, request.param)


def test_official_figures(case):
    """Divergences over channels, range over the whole matrix; the search on a grid of 5 x 10 x 11 x 10."""
    close(case.captions[0], case["caption_row0"], 1e-6)
    assert case.captions.double().sum().item() == pytest.approx(float(case["caption_checksum"]), rel=1e-5)
    s, val, labels = case.x[case.support], case.x[case.val], case.y[case.support]
    keys, probe = case.channels(case.support), case.test[case.probe]
    close(divergence(case.channels(probe), keys), case["kl_test64"], 5e-4)
    kl = divergence(case.channels(case.test), keys)
    close([kl.min(), kl.max()], case["kl_test_minmax"], 5e-4)

    affinities = [mixed(val, s, case.captions, delta) for delta in DELTAS]
    kl_val = divergence(case.channels(case.val), keys)
    ranges = [(float(a.min()), float(a.max())) for a in affinities]
    kl_logits = [official_affinity(kl_val, *ends, 10).float() @ case.values for ends in ranges]
    *best, which = best_signature_cache(
        100 * val @ case.t.T, affinities, case.values, kl_logits, case.y[case.val], (5, 10, 10)
    )
    alpha, beta, gamma, delta = (float(case[name]) for name in ("alpha", "beta", "gamma", "delta"))
    assert (*best, DELTAS[which]) == pytest.approx((alpha, beta, gamma, delta))

    settings = {"alpha": alpha, "beta": beta, "gamma": gamma, "delta": delta}
    head = create("caps-adapter", **settings, signature="channels", scaling="official")
    head.fit_features(s, labels, case.t, captions=case.captions)
    logits = head.logits(case.x[case.test])
    close(logits[case.probe], case["test_logits64"], 3e-4)
    affinity = mixed(case.x[case.test], s, case.captions, delta)
    kl_logits = official_logits(case.channels(case.test), keys, case.values, affinity, 10)
    close(kl_logits[case.probe], case["kl_logits64"], 3e-4)
    assert case.accuracy(logits) == pytest.approx(float(case["test_acc"]), abs=0.2)


def test_search_is_the_plain_search():
    rng = np.random.default_rng(0)
    images, captions, zero_shot, kl = (
        torch.from_numpy(scale * rng.standard_normal(shape))
        for scale, shape in ((0.3, (9, 6)), (0.3, (9, 6)), (5, (9, 3)), (1, (11, 9, 3)))
    )
    values, labels = one_hot(torch.arange(6) % 3, 3).double(), torch.arange(9) % 3
    affinities = [(1 - delta) * images + delta * captions for delta in DELTAS]
    best, plain = -1, ()
    alphas, betas, gammas = published_grid((3, 6, 7))
    for alpha in alphas:
        for beta in betas:
            for d, affinity in enumerate(affinities):
                for gamma in gammas:
                    logits = zero_shot + gamma * kl[d] + alpha * torch.exp(-(beta - beta * affinity)) @ values
                    right = int((logits.argmax(1) == labels).sum())
                    if right > best:
                        best, plain = right, (alpha, beta, gamma, d)
    assert best_signature_cache(zero_shot, affinities, values, list(kl), labels, (3, 6, 7)) == pytest.approx(plain)


def test_without_captions_weight_it_is_sus_x():
    x, y, t, q = random_case([3, 3, 3, 3])
    ours = create("caps-adapter", delta=0.0).fit_features(x, y, t).logits(q)
    torch.testing.assert_close(ours, create("sus-x").fit_features(x, y, t).logits(q))


def test_logits_by_plain_computation():
    x, y, t, q = random_case([3, 3, 3, 3])
    g = normalize(t[y] + 0.2 * torch.randn(12, 8, generator=torch.Generator().manual_seed(4)), dim=1)
    settings = {"alpha": 2.0, "beta": 4.0, "gamma": 1.5, "delta": 0.3}
    for signature in ("classes", "channels"):
        head = create("caps-adapter", **settings, signature=signature).fit_features(x, y, t, captions=g)
        p, keys = ((2 * z @ t.T if signature == "classes" else 2 * z).double().softmax(1) for z in (q, x))
        a, own = (0.7 * z @ x.T + 0.3 * z @ g.T for z in (q, x))
        kl = torch.stack([(r * (r / keys).log()).sum(1) for r in p])
        kl_own = torch.stack([(r * (r / keys).log()).sum(1) for r in keys])
        other = ~torch.eye(12, dtype=torch.bool)
        scale = (own[other].max() - own[other].min()) / (kl_own[other].max() - kl_own[other].min())
        values = one_hot(y, 4).double()
        plain = 100 * q @ t.T + 2 * torch.exp(-4 * (1 - a)).double() @ values - 1.5 * scale * kl @ values
        ours = head.logits(q).double()
        torch.testing.assert_close(ours - ours[:, :1], plain - plain[:, :1], atol=1e-3, rtol=1e-4)


def test_validation_chooses(case):
    val = case.x[case.val], case.y[case.val]
    head = create("caps-adapter").fit_features(
        case.x[case.support], case.y[case.support], case.t, val=val, captions=case.captions
    )
    assert head.delta_ in DELTAS
    plain = create("caps-adapter").fit_features(
        case.x[case.support], case.y[case.support], case.t, captions=case.captions
    )
    right = [(h.logits(val[0]).argmax(1) == val[1]).sum() for h in (head, plain)]
    assert right[0] >= right[1]


# -- images and captions --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


def brightness(images: list[Image.Image]) -> list[str]:
    """A captioner that says something of an image, and nothing of its class."""
    return ["small cat" if np.asarray(image).mean() > 110 else "large house" for image in images]


class Painter:
    """An image source that draws from prompts: a plain image for each, in a colour that depends on the prompt."""

    def __init__(self) -> None:
        self.prompts: dict[str, list[str]] | None = None

    def __call__(self, class_names, per_class, seed, prompts=None) -> Dataset:
        self.prompts = prompts
        made = [(prompts[n][i % len(prompts[n])], c) for c, n in enumerate(class_names) for i in range(per_class)]
        images = [Image.new("RGB", (32, 32), (len(p), 40 * c, 7 * seed)) for p, c in made]
        items = [ImageItem(prompt, image) for (prompt, _), image in zip(made, images, strict=True)]
        return Dataset(items, [c for _, c in made], list(class_names), name="painted")


def test_without_captions_the_class_texts_take_their_place(backbone):
    support = colours(2, seed=1)
    model = create("caps-adapter").fit(backbone, support)
    texts = encode_classes(backbone, support.class_names, "photo")
    torch.testing.assert_close(model.captions_, texts[support.labels])


def test_captions_as_list_mapping_or_captioner(backbone, tmp_path):
    support, queries = colours(2, seed=1), colours(2, seed=2)
    said = brightness([item.open() for item in support.items])
    assert len(set(said)) == 2
    by_list = create("caps-adapter", captions=said).fit(backbone, support)
    torch.testing.assert_close(by_list.captions_, backbone.encode_texts(said))
    names = {item.name: sentence for item, sentence in zip(support.items, said, strict=True)}
    by_name = create("caps-adapter", captions=names).fit(backbone, support)
    by_captioner = create("caps-adapter", captioner=brightness).fit(backbone, support)
    for other in (by_name, by_captioner):
        np.testing.assert_array_equal(other.predict_proba(queries), by_list.predict_proba(queries))
    first = support.items[0].name
    mixed_up = create("caps-adapter", captions={first: "a star"}, captioner=brightness).fit(backbone, support)
    torch.testing.assert_close(mixed_up.captions_, backbone.encode_texts(["a star", *said[1:]]))
    assert recipe(by_captioner)["hyperparameters"]["captioner"] == "brightness"
    loaded = clipadapt.load(by_captioner.save(tmp_path / "model"), backbone)
    np.testing.assert_array_equal(loaded.predict_proba(queries), by_list.predict_proba(queries))


def test_unlabelled_images_without_a_source(backbone):
    """They join the support as what zero-shot CLIP takes them for, with captions of their own."""
    support, more = colours(1, seed=1), colours(2, seed=3)
    model = create("caps-adapter", captioner=brightness).fit(backbone, support, unlabelled=more)
    texts = encode_classes(backbone, support.class_names, "photo")
    seen = (encode_images(backbone, more).features @ texts.T).argmax(1)
    labels = torch.cat([torch.tensor(support.labels), seen])
    torch.testing.assert_close(model.values_, one_hot(labels, 4).float())
    said = brightness([item.open() for item in [*support.items, *more.items]])
    torch.testing.assert_close(model.captions_, backbone.encode_texts(said))


def test_the_recipe_of_the_paper(backbone):
    """Captions of unlabelled images become prompts, these images, and both together the caches."""
    names, found = ["red", "blue", "dog"], colours(3, seed=3)
    painter = Painter()
    settings = {"source": painter, "per_class": 3, "captioner": brightness, "seed": 2}
    model = create("caps-adapter", **settings).fit(backbone, class_names=names, unlabelled=found)
    texts = encode_classes(backbone, names, "photo")
    seen = (encode_images(backbone, found).features @ texts.T).argmax(1).tolist()
    said = brightness([item.open() for item in found.items])
    expected = {
        name: [f"a photo of a {name}. {caption}" for caption, label in zip(said, seen, strict=True) if label == c]
        or [f"a photo of a {name}."]
        for c, name in enumerate(names)
    }
    assert painter.prompts == expected
    used = [expected[name][i % len(expected[name])] for name in names for i in range(3)]
    torch.testing.assert_close(model.captions_, backbone.encode_texts(used))
    drawn = painter(names, 3, 2, expected)
    torch.testing.assert_close(model.keys_, encode_images(backbone, drawn).features)
    assert model.values_.sum(0).tolist() == [3, 3, 3]

    # captions of labelled images are for their own class, and they are in the caches, too
    support = colours(1, seed=1).only(["red", "blue"])
    model = create("caps-adapter", **settings).fit(backbone, support)
    said = brightness([item.open() for item in support.items])
    sentences = [f"a photo of a {name}. {caption}" for name, caption in zip(("red", "blue"), said, strict=True)]
    assert list(painter.prompts.values()) == [[sentence] for sentence in sentences]
    expected_texts = [*said, *(sentence for sentence in sentences for _ in range(3))]
    torch.testing.assert_close(model.captions_, backbone.encode_texts(expected_texts))


def test_names_and_any_source_suffice(backbone):
    made = colours(2, seed=5)
    model = create("caps-adapter", source=made).fit(backbone, class_names=made.class_names)
    plain = create("caps-adapter").fit(backbone, made)
    queries = colours(2, seed=2)
    np.testing.assert_array_equal(model.predict_proba(queries), plain.predict_proba(queries))
    described = create("caps-adapter", source=made, captioner=brightness).fit(backbone, class_names=made.class_names)
    said = brightness([item.open() for item in made.items])
    torch.testing.assert_close(described.captions_, backbone.encode_texts(said))


def test_refused(backbone):
    support = colours(2, seed=1)
    with pytest.raises(ClipadaptError, match="captions must be 8 sentences"):
        create("caps-adapter", captions=["a"] * 7).fit(backbone, support)
    with pytest.raises(ClipadaptError, match=f"captions has none for {support.items[0].name!r}; add it"):
        create("caps-adapter", captions={"no such": "a"}).fit(backbone, support)
    with pytest.raises(ClipadaptError, match="one string per image, a list of 8"):
        create("caps-adapter", captioner=lambda images: "one").fit(backbone, support)
    with pytest.raises(ClipadaptError, match='captioner is "phrases", a hub id or folder'):
        create("caps-adapter", captioner=3).fit(backbone, support)
    with pytest.raises(ClipadaptError, match="learns from labelled images"):
        create("caps-adapter").fit(backbone, class_names=support.class_names)
    x, y, t, _ = random_case([3, 3])
    with pytest.raises(ClipadaptError, match=r"captions must have shape \(6, 8\)"):
        create("caps-adapter").fit_features(x, y, t, captions=x[:5])
    with pytest.raises(ClipadaptError, match=r"source needs fit\(backbone"):
        create("caps-adapter", source=support).fit_features(torch.zeros(0, 8), [], torch.eye(8)[:3])
