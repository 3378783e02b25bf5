"""How well a contrastively trained CLIP knows what was kept out of its corpus; called while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipadapt.backbones import Backbone
from clipadapt.data.corpus.pairs import SIZE, Corpus
from clipadapt.data.corpus.sources import HELDOUT_SETS
from clipadapt.training.embedded.patches import passed

Hook = Callable[[Backbone], dict[str, Any]]

TEMPLATES = ("a photo of a {}.", "{}")


def corpus_hooks(
    corpus: Corpus, image_size: int, *, playground_per_kind: int = 10, trunk: Backbone | None = None
) -> dict[str, Hook]:
    """Evaluations for `train_contrastive`, by name; every figure is a share in [0, 1].

    heldout_style  one image a name in the emoji style never trained on. `top1`: names that were trained on in other
                   styles, told apart among all names of the style by "a photo of a {}."; `top1_ensemble`: the same with
                   the bare name added; `top1_new_names`: names never trained on in any style, told from each other
    playground     new images: `top1` of the kinds trained on, `top1_new_kinds` of those never seen, told from each
                   other, `top1_new_style` of the trained kinds in the style never seen; by "a photo of a {}."
    retrieval      recall at 1 both ways among 1,000 images of the held-out splits with distinct names

    A `trunk` that does not learn gives all patches at once, so that each evaluation costs little.
    """
    return {
        "heldout_style": _heldout_style(corpus, image_size, trunk),
        "playground": _playground(image_size, playground_per_kind, trunk),
        "retrieval": _retrieval(corpus, image_size, trunk=trunk),
    }


# Features in batches, as the shipped model will give them (float32, all patches).


@torch.no_grad()
def _images(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Unit features of pixels, or of patches that a trunk gave."""
    transform: Any = backbone.preprocess
    ready = transform.of_bytes if pixels.dtype == torch.uint8 else Tensor.float
    features = [backbone.encode_images(ready(batch), normalize=False).cpu() for batch in pixels.split(256)]
    return normalize(torch.cat(features), dim=-1)


def _seen(pixels: Tensor, trunk: Backbone | None) -> Tensor:
    """Pixels (N, 3, S, S) uint8 as they are, or the patches that a trunk gives for them."""
    return pixels if trunk is None else passed(trunk, pixels)


@torch.no_grad()
def _texts(backbone: Backbone, texts: list[str]) -> Tensor:
    features = []
    for start in range(0, len(texts), 256):
        tokens = backbone.tokenizer(
            texts[start : start + 256],
            padding=True,
            truncation=True,
            max_length=backbone.context_length,
            return_tensors="pt",
        )
        features.append(backbone.encode_tokens(tokens["input_ids"], normalize=False).cpu())
    return normalize(torch.cat(features), dim=-1)


def _top1(images: Tensor, classes: Tensor, labels: Tensor) -> float:
    return ((images @ classes.T).argmax(1) == labels).float().mean().item()


def _one_per_name(corpus: Corpus, split: str) -> dict[str, int]:
    """Name -> its first image in the held-out style, skin tones left aside."""
    chosen: dict[str, int] = {}
    for source in HELDOUT_SETS:
        for index in corpus.select(split, source=source):
            pair = corpus.pairs[index]
            if not any("skin tone" in text for text in pair["texts"]):
                chosen.setdefault(pair["name"], index)
    return chosen


def _heldout_style(corpus: Corpus, image_size: int, trunk: Backbone | None) -> Hook:
    trained, new = _one_per_name(corpus, "heldout-style"), _one_per_name(corpus, "heldout-name")
    names = [*trained, *new]
    pixels = _seen(corpus.views([*trained.values(), *new.values()], image_size), trunk)
    labels = torch.arange(len(names))

    def hook(backbone: Backbone) -> dict[str, Any]:
        images = _images(backbone, pixels)
        plain, bare = (_texts(backbone, [template.format(name) for name in names]) for template in TEMPLATES)
        n = len(trained)
        return {
            "top1": _top1(images[:n], plain, labels[:n]),
            "top1_ensemble": _top1(images[:n], normalize(plain + bare, dim=-1), labels[:n]),
            "top1_new_names": _top1(images[n:], plain[n:], labels[: len(new)]),
            "names": len(names),
            "new_names": len(new),
        }

    return hook


def _playground(image_size: int, per_kind: int, trunk: Backbone | None) -> Hook:
    from clipadapt.data.playground.drawing import HELDOUT_KINDS, HELDOUT_STYLE, KINDS, STYLES, Playground

    seen = [kind for kind in KINDS if kind not in HELDOUT_KINDS]
    styles = [style for style in STYLES if style != HELDOUT_STYLE]

    def draw(kinds: list[str], styles: list[str]) -> tuple[Tensor, Tensor, list[str]]:
        data = Playground(size=SIZE, kinds=tuple(kinds), styles=tuple(styles), seed=1_000).dataset(per_kind, by="kind")
        images = [item.open().resize((image_size, image_size), 3) for item in data.items]  # 3: bicubic
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
        return _seen(pixels, trunk), torch.tensor(data.labels), data.class_names

    tasks = {
        "top1": draw(seen, styles),
        "top1_new_kinds": draw(list(HELDOUT_KINDS), styles),
        "top1_new_style": draw(seen, [HELDOUT_STYLE]),
    }

    def hook(backbone: Backbone) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for name, (pixels, labels, class_names) in tasks.items():
            classes = _texts(backbone, [TEMPLATES[0].format(class_name) for class_name in class_names])
            figures[name] = _top1(_images(backbone, pixels), classes, labels)
        return figures | {"kinds": len(seen), "new_kinds": len(HELDOUT_KINDS)}

    return hook


def _retrieval(corpus: Corpus, image_size: int, count: int = 1_000, trunk: Backbone | None = None) -> Hook:
    heldout = [*corpus.select("heldout-style"), *corpus.select("heldout-name")]
    order = np.random.default_rng(0).permutation(len(heldout))
    chosen: dict[str, int] = {}
    for position in order:
        chosen.setdefault(corpus.pairs[heldout[position]]["name"], heldout[position])
    texts, indices = list(chosen)[:count], list(chosen.values())[:count]
    pixels = _seen(corpus.views(indices, image_size), trunk)

    def hook(backbone: Backbone) -> dict[str, Any]:
        similarity = _images(backbone, pixels) @ _texts(backbone, texts).T  # (N, N)
        labels = torch.arange(len(texts))
        return {
            "image_to_text": (similarity.argmax(1) == labels).float().mean().item(),
            "text_to_image": (similarity.argmax(0) == labels).float().mean().item(),
            "pairs": len(texts),
        }

    return hook
