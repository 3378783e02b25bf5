"""Several objects: which of them does each tower see, by size in an image and by mention in a text?

The probes of Abbasi et al., "CLIP Under the Microscope: A Fine-Grained Analysis of Multi-Object Representation" (arXiv
2502.19842), which found that image towers favour large objects and text towers those mentioned first. Read were the
abstract and the official code (clip-oscope/clip-oscope), whose probes these are; images come from the playground
instead of its rendered data sets. An image shows 2 to 4 objects of different kinds in the corners, one large (0.52 to
0.58 of the side), the others small (0.24 to 0.28); kinds, colours, styles, and the large one's corner are random.

    named        the kind that the method gives the whole image, among all kinds: the large object's, or a small one's
    image probe  a linear classifier of image features for the object in each corner; its accuracy where that object is
                 large, and where it is small (in the official code the large object is always at the same place)
    text probe   a linear classifier of text features for the object at each place of "a X and a Y and a Z"
    retrieval    which object's own text, "a X", is nearest to the whole text: that at the first place, the second ...
    matching     is the image nearer to its text than to one with a wrong object? Every kind that is not shown takes
                 the place of an object in turn:

                    large first       text: large first        wrong text: the large object, first, is replaced
                    small replaced    text: large first        wrong text: the last object, a small one, is replaced
                    large last        text: large last         wrong text: as above, so the large one stays first

"drop" is the published comparison, large first against large last; "drop by order" is small replaced against large
last, which differ in nothing but the order of the true text. The data set of the cell is learned from, where the method
learns, and nothing else. Prompts that a method learns take part in "named" alone; changed towers take part in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from clipadapt.backbones import Backbone
from clipadapt.data import Split
from clipadapt.data.items import GeneratedItem, Item
from clipadapt.data.playground.drawing import VERSION
from clipadapt.data.playground.styles import COLOURS, STYLES, cut_out
from clipadapt.errors import DataError
from clipadapt.evaluation.protocol import NotApplicable, Outcome, check, fit
from clipadapt.features import encode_images
from clipadapt.methods import Method
from clipadapt.renamed import old_names

# Twelve kinds that the embedded model names best where they are alone.
KINDS = ("square", "diamond", "ring", "arrow", "spiral", "drop", "gear", "leaf", "carrot", "cat", "ladder", "chair")
CORNERS = ((-1, -1), (1, -1), (1, 1), (-1, 1))
LARGE, SMALL = (0.52, 0.58), (0.24, 0.28)  # extent as a share of the image's side
TRAINED = 0.75  # share of images and texts that probes learn from


class Layout(NamedTuple):
    """What an image shows: kinds as indices, the large one first, and the corner of each."""

    kinds: tuple[int, ...]
    corners: tuple[int, ...]


def layouts(n: int, kinds: int, objects: int, seed: int) -> list[Layout]:
    """`n` images of `objects` different kinds out of `kinds`, in different corners."""
    rng = np.random.default_rng([seed, objects])
    return [
        Layout(tuple(rng.permutation(kinds)[:objects].tolist()), tuple(rng.permutation(4)[:objects].tolist()))
        for _ in range(n)
    ]


def draw(
    layout: Layout, kinds: Sequence[str], styles: Sequence[str], seed: Sequence[int], size: int = 64
) -> Image.Image:
    """The image, of `size` x `size`; colours, style and all else come from `seed`."""
    rng = np.random.default_rng(seed)
    canvas = 2 * size
    cuts = []
    for i, (kind, corner) in enumerate(zip(layout.kinds, layout.corners, strict=True)):
        middle = [0.5 + d * (0.18 if i == 0 else 0.32) + rng.uniform(-0.015, 0.015) for d in CORNERS[corner]]
        extent = rng.uniform(*(SMALL if i else LARGE))
        colour = list(COLOURS.values())[int(rng.integers(len(COLOURS)))]
        turn, stretch = rng.uniform(-9, 9), rng.uniform(0.93, 1.07)
        place = (middle[0] * canvas, middle[1] * canvas)
        cuts.append(cut_out(kinds[kind], colour, "plain", place, extent * canvas, turn, stretch, canvas))
    style = styles[int(rng.integers(len(styles)))]
    return STYLES[style].render(cuts, canvas, rng)


def text_of(kinds: Sequence[str]) -> str:
    """ "a star and an umbrella"."""
    return " and ".join(f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" for kind in kinds)


def probe(features: Tensor, labels: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Hits (N,) of a linear classifier of features (N, D), learned from the rows `train` (N,) bool, on all rows."""
    x = features.numpy()
    # The features' spread is small on the unit sphere; scaled up, the penalty does not decide.
    model = LogisticRegression(C=100.0, max_iter=500).fit(x[train], labels[train])
    return model.predict(x) == labels


def text_probes(
    backbone: Backbone, kinds: Sequence[str], objects: int, n: int, seed: int
) -> tuple[list[float], list[float]]:
    """(probe's accuracy, share of retrievals) of the object at each place (objects,), from `n` texts.

    For any backbone with a text tower and any names; shares of retrievals and that of absent kinds add up to 1.
    """
    rng = np.random.default_rng([seed, objects, 1])
    shown = np.array([rng.permutation(len(kinds))[:objects] for _ in range(n)])  # (n, objects)
    texts = [text_of([kinds[i] for i in row]) for row in shown]
    features = encode_texts(backbone, [*texts, *(text_of([kind]) for kind in kinds)])
    whole, single = features[:n], features[n:]  # (n, D), (K, D)
    train = np.arange(n) < TRAINED * n
    read = [float(probe(whole, shown[:, j], train)[~train].mean()) for j in range(objects)]
    nearest = (whole @ single.T).argmax(1).numpy()
    return read, (nearest[:, None] == shown).mean(0).tolist()


def image_probe(features: Tensor, shown: Sequence[Layout]) -> tuple[float, float]:
    """Accuracy of reading the object in a corner from image features (N, D): (where it is large, where it is small)."""
    hits: dict[bool, list[bool]] = {True: [], False: []}
    train = np.arange(len(shown)) < TRAINED * len(shown)
    for corner in range(len(CORNERS)):
        rows = np.array([i for i, layout in enumerate(shown) if corner in layout.corners])
        place = [shown[i].corners.index(corner) for i in rows]
        labels = np.array([shown[i].kinds[p] for i, p in zip(rows, place, strict=True)])
        right = probe(features[torch.from_numpy(rows)], labels, train[rows])
        for i, p, hit in zip(rows, place, right, strict=True):
            if not train[i]:
                hits[p == 0].append(bool(hit))
    return float(np.mean(hits[True])), float(np.mean(hits[False]))


def matching(backbone: Backbone, features: Tensor, shown: Sequence[Layout], kinds: Sequence[str]) -> dict[str, float]:
    """Accuracy of telling the text of image features (N, D) from a wrong one, as the module's docstring says."""
    questions: dict[str, list[tuple[int, str, str]]] = {"large first": [], "small replaced": [], "large last": []}
    for i, layout in enumerate(shown):
        first = [kinds[k] for k in layout.kinds]
        last = [first[-1], *first[1:-1], first[0]]  # swapped, as in the official code
        for wrong in (kind for kind in kinds if kind not in first):
            replaced = text_of([*first[:-1], wrong])
            questions["large first"].append((i, text_of(first), text_of([wrong, *first[1:]])))
            questions["small replaced"].append((i, text_of(first), replaced))
            questions["large last"].append((i, text_of(last), replaced))
    texts = sorted({text for asked in questions.values() for _, *pair in asked for text in pair})
    row = {text: i for i, text in enumerate(texts)}
    encoded = encode_texts(backbone, texts)  # (T, D)
    found = {}
    for name, asked in questions.items():
        seen = features[[i for i, *_ in asked]]
        its_own = (seen * encoded[[row[text] for _, text, _ in asked]]).sum(1)
        another = (seen * encoded[[row[text] for *_, text in asked]]).sum(1)
        found[name] = float((its_own > another).double().mean())
    return found


def encode_texts(backbone: Backbone, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Unit text features (T, D) on the CPU."""
    with torch.no_grad():
        parts = [backbone.encode_texts(list(texts[i : i + batch_size])) for i in range(0, len(texts), batch_size)]
    return torch.cat(parts).float().cpu()


def run(
    method: Method,
    backbone: Backbone,
    split: Split,
    seed: int,
    *,
    objects: int = 3,
    pictures_shown: int = 1200,
    texts: int = 1200,
    shots: int = 16,
    kinds: Sequence[str] = KINDS,
    styles: Sequence[str] = ("flat",),
) -> Outcome:
    """The figures of the probes, as the module's docstring names them.

    Args:
        objects: in an image and in a text: 2, 3 or 4.
        pictures_shown: images that are drawn.
        texts: that are probed.
        shots: images of each class of the data set to learn from.
        kinds: of the objects.
        styles: that images are drawn in.
    """
    check(method, backbone, new_classes=True)
    if "texts" not in backbone.capabilities:
        raise NotApplicable(f"multi-object needs a backbone with a tokenizer, which {backbone.source} lacks.")
    if not 2 <= objects <= len(CORNERS) or objects >= len(kinds):
        raise DataError(f"multi-object: objects must be 2, 3 or 4, and fewer than the kinds, not {objects}.")
    if method.card.signal == "none":
        model, seconds = fit(method, backbone, None, class_names=kinds)
        namer = model
    else:
        model, seconds = fit(method, backbone, split.train.few_shot(shots, seed=seed))
        namer = model.with_classes(kinds)
    towers: Any = model.backbone_
    shown = layouts(pictures_shown, len(kinds), objects, seed)
    items: list[Item] = [
        GeneratedItem(
            f"{'+'.join(kinds[k] for k in layout.kinds)}/{i}",
            # "Picture" is the old name of `Layout`, kept in this key so that cached features stay valid
            f"multi-object 1 {VERSION} Picture(kinds={layout.kinds}, corners={layout.corners}) "
            f"{kinds} {styles} {seed} {i}",
            partial(draw, layout, tuple(kinds), tuple(styles), (seed, i)),
        )
        for i, layout in enumerate(shown)
    ]
    named = namer.image_logits(items)[0][:, : len(kinds)].argmax(1).tolist()
    at = [layout.kinds.index(name) if name in layout.kinds else -1 for name, layout in zip(named, shown, strict=True)]
    features = encode_images(towers, items).features
    read_large, read_small = image_probe(features, shown)
    read, nearest = text_probes(towers, kinds, objects, texts, seed)
    tested = [i for i in range(len(shown)) if i >= TRAINED * len(shown)]
    matched = matching(towers, features[tested], [shown[i] for i in tested], kinds)
    figures = {
        "named: large": float(np.equal(at, 0).mean()),
        "named: a small one": float(np.greater(at, 0).mean()),
        "image probe: large": read_large,
        "image probe: small": read_small,
        "text probe: first": read[0],
        "text probe: later": float(np.mean(read[1:])),
        "retrieval: first": nearest[0],
        "retrieval: later, each": float(np.mean(nearest[1:])),
        "matching": matched["large first"],
        "matching after re-ordering": matched["large last"],
        "drop": matched["large first"] - matched["large last"],
        "drop by order": matched["small replaced"] - matched["large last"],
    }
    details = {"text_probe": read, "retrieval": nearest, "matching": matched, "kinds": list(kinds)}
    return Outcome(figures, model, seconds, details=details)


__getattr__ = old_names(__name__)
