"""LABCLIP: swapped captions, the official loss, and binding that a linear map brings across modalities."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import normalize

from clipadapt.backbones import load_backbone
from clipadapt.data import image_list
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from clipadapt.methods.feature_adapter.labclip import ATTRIBUTES, contrastive, swapped
from tests.images import colours
from tests.tiny import tiny_clip


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("red circle and blue square", "blue circle and red square"),
        ("A Red circle, a small red dot and an orange square.", "An orange circle, a small red dot and a Red square."),
        ("a small cat and a large dog", "a large cat and a small dog"),
        ("a small red cat and a large blue dog", "a small blue cat and a large red dog"),  # colours come first
        ("a striped star and an orange star", None),
        ("red circle and red square", None),
        ("a redwood and a bluebird", None),
        ("", None),
    ],
)
def test_swapped(caption, expected):
    assert (swapped(caption, ATTRIBUTES) or "").lower() == (expected or "").lower()


def test_swapped_with_own_words():
    assert swapped("a dog chases a cat", {"animal": ["cat", "dog"]}) == "a cat chases a dog"
    assert swapped("a light blue cup, a blue car", {"colour": ["light blue", "blue"]}) == "a blue cup, a light blue car"


def test_the_official_loss():
    """Images among 2 B texts, the own first; texts among B images; the mean of both, as written in a loop."""
    generator = torch.Generator().manual_seed(0)
    x, u, v = (normalize(torch.randn(5, 8, generator=generator), dim=1) for _ in range(3))
    scale, total = torch.tensor([3.0]), 0.0
    for i in range(5):
        among_texts = [3 * x[i] @ t for t in [*u, *v]]
        among_images = [3 * u[i] @ y for y in x]
        for scores in (among_texts, among_images):
            total -= (scores[i].exp() / sum(s.exp() for s in scores)).log().item() / 10
    loss, right = contrastive(x, u, v, scale)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert right.tolist() == [int((x[i] @ torch.cat([u, v]).T).argmax()) == i for i in range(5)]


def world(number: int, seed: int, basis: np.ndarray) -> tuple[np.ndarray, ...]:
    """Two things with an attribute each: (images, labels, captions, swapped captions), binding told in two codes.

    Both modalities share the bag of words. Who has what is in other directions of images than of texts.
    """
    rng = np.random.default_rng(seed)
    bag, image_code, text_code = basis[:10], basis[10:35], basis[35:60]
    facts = [(a, k, b, m) for k, m in combinations(range(5), 2) for a, b in permutations(range(5), 2)]

    def features(fact: tuple[int, ...], code: np.ndarray) -> np.ndarray:
        a, k, b, m = fact
        return bag[a] + bag[b] + bag[5 + k] + bag[5 + m] + 0.7 * (code[5 * k + a] + code[5 * m + b])

    labels = rng.integers(len(facts), size=number)
    images = np.stack([features(facts[label], image_code) for label in labels])
    images += 0.1 * rng.standard_normal(images.shape)
    captions = np.stack([features(fact, text_code) for fact in facts])
    wrong = np.stack([features((b, k, a, m), text_code) for a, k, b, m in facts])
    return images, labels, captions, wrong


@pytest.mark.claim("labclip", "made-up features: which of two captions with swapped attributes is the picture's")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_binding_within_modalities_is_brought_across_them(seed, claim):
    """Swapped captions: chance before, found after, of captions never learned too; retrieval is no worse; probes."""
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((64, 64)))[0]
    images, labels, captions, wrong = world(1500, seed, basis)
    known = np.random.default_rng(seed).permutation(len(captions)) >= 50  # the 50 other captions are new
    learned, number = known[labels], np.cumsum(known) - 1
    model = create("labclip").fit_features(
        images[learned], number[labels[learned]], captions[known], 20.0, negatives=wrong[known]
    )
    x, y = images[~learned], labels[~learned]

    def cosines(text: np.ndarray, adapted: bool) -> np.ndarray:
        t = torch.from_numpy(text).float()
        return x @ normalize(t @ model.map_.T if adapted else t, dim=1).numpy().T  # (N, C)

    matching, retrieval = [], []
    for adapted in (False, True):
        own, other = cosines(captions, adapted), cosines(wrong, adapted)
        rows = np.arange(len(y))
        matching.append((own[rows, y] > other[rows, y]).mean())
        retrieval.append((own.argmax(1) == y).mean())
    claim({"labclip": matching[1], "zero-shot": matching[0]})
    assert 0.35 < matching[0] < 0.65
    assert matching[1] > 0.95
    assert retrieval[1] > retrieval[0]
    # Probes: which attribute has thing 0, from images and from captions alone, where a bag of words leaves two.
    shown = captions @ basis[5] > 0.5
    attribute = (captions @ basis[35:40].T).argmax(1)
    rows = np.flatnonzero(shown[labels])
    probe = LogisticRegression(C=100).fit(images[rows[::2]], attribute[labels[rows[::2]]])
    assert probe.score(images[rows[1::2]], attribute[labels[rows[1::2]]]) > 0.95
    rows = np.flatnonzero(shown)
    probe = LogisticRegression(C=100).fit(captions[rows[::2]], attribute[rows[::2]])
    assert probe.score(captions[rows[1::2]], attribute[rows[1::2]]) > 0.8


def test_hard_negatives_are_what_teaches_binding():
    """With one caption of each pair only, plain contrast never meets its opposite."""
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((64, 64)))[0]
    images, labels, captions, wrong = world(400, 1, basis)
    rows, right = np.arange(len(labels)), []
    for negatives in (None, wrong):
        model = create("labclip", epochs=20).fit_features(images, labels, captions, 20.0, negatives=negatives)
        mapped = [normalize(torch.from_numpy(t).float() @ model.map_.T, dim=1).numpy() for t in (captions, wrong)]
        right.append(((images @ mapped[0].T)[rows, labels] - (images @ mapped[1].T)[rows, labels]).mean())
    assert right[1] > right[0] > 0


def test_a_row_of_zeros_is_no_negative():
    """Only some classes have a hard negative; the others take part in the plain loss."""
    generator = torch.Generator().manual_seed(0)
    x, t, wrong = (normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (6, 3, 3))
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    wrong[1] = 0
    model = create("labclip", epochs=1).fit_features(x, y, t, negatives=wrong)
    linear, scale = torch.eye(8).requires_grad_(), torch.zeros(1).requires_grad_()
    hard = normalize(wrong[[0, 2, 0, 2]] @ linear.T, dim=1)
    contrastive(x, normalize(t @ linear.T, dim=1)[y], hard, scale.exp())[0].backward()
    torch.optim.Adam([linear, scale], lr=0.01).step()
    torch.testing.assert_close(model.map_, linear.detach(), atol=1e-4, rtol=1e-4)


def captioned(names: list[str]):
    found = colours(2, seed=1)
    return image_list([item.open() for item in found.items], found.labels, names)


@pytest.mark.parametrize("how", ["words", "given"])
def test_class_names_are_captions(how):
    """Negatives come from the captions or are given; the fit equals that on features."""
    backbone = load_backbone(tiny_clip())
    names = ["red cat and blue dog", "a green house", "blue star and red house", "a cat"]
    wrong = {names[0]: "blue cat and red dog", names[2]: "red star and blue house"}
    given = {"negatives": wrong, "attributes": {"none": ["nothing"]}} if how == "given" else {}
    support = captioned(names)
    model = create("labclip", epochs=3, **given).fit(backbone, support)
    with torch.no_grad():
        texts = backbone.encode_texts(names)
        negatives = backbone.encode_texts(list(wrong.values()))
        images = backbone.encode_images(torch.stack([backbone.preprocess(item.open()) for item in support.items]))
    plain = create("labclip", epochs=3).fit_features(images, support.labels, texts, backbone.logit_scale)
    assert (plain.weight_ - model.weight_).abs().max() > 1e-3  # the negatives count
    one, two = names[0], names[2]
    both = create("labclip", epochs=3, **({"negatives": wrong} if given else {})).fit(
        backbone, support.only([one, two])
    )
    rows = [i for i, label in enumerate(support.labels) if label in (0, 2)]
    head = create("labclip", epochs=3).fit_features(
        images[rows], [0, 0, 1, 1], texts[[0, 2]], backbone.logit_scale, negatives=negatives
    )
    torch.testing.assert_close(head.weight_, both.weight_, atol=1e-3, rtol=1e-3)
    other = model.with_classes(["a cat", "blue house and red star"])
    expected = model.logit_scale_ * normalize(
        backbone.encode_texts(["a cat", "blue house and red star"]).detach() @ model.map_.T, dim=1
    )
    torch.testing.assert_close(other.weight_, expected)


def test_bad_input():
    with pytest.raises(ClipadaptError, match=r"attributes = \['red', 'blue'\] must map kinds of attribute to"):
        create("labclip", attributes=["red", "blue"])
    with pytest.raises(ClipadaptError, match=r"attributes = .* must map kinds of attribute to lists of words"):
        create("labclip", attributes={"colour": "red"})
    with pytest.raises(ClipadaptError, match=r"negatives = \['blue cat'\] must map class names to sentences"):
        create("labclip", negatives=["blue cat"])
    with pytest.raises(ClipadaptError, match=r"Unknown class in labclip's negatives 'a bat'; did you mean 'a cat'"):
        create("labclip", negatives={"a bat": "x"}).fit(load_backbone(tiny_clip()), captioned(["a cat", "b", "c", "d"]))
    x, t = np.eye(4), np.eye(4)[:2]
    with pytest.raises(ClipadaptError, match="negatives are of 3 classes and text_features of 2"):
        create("labclip").fit_features(x, [0, 1, 0, 1], t, negatives=np.eye(4)[:3])
    with pytest.raises(ClipadaptError, match=r"Unknown input of labclip.fit_features 'negative'; did you mean"):
        create("labclip").fit_features(x, [0, 1, 0, 1], t, negative=t)
