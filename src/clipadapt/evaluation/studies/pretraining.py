"""How well a contrastively trained CLIP knows what was kept out of its corpus; called while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipadapt.data.corpus.pairs import Corpus
from clipadapt.data.corpus.sources import HELDOUT_SETS
from clipadapt.training.pairs import PIXEL_MEAN, PIXEL_STD

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

Hook = Callable[["CLIPModel"], dict[str, Any]]

TEMPLATES = ("a photo of a {}.", "{}")


def corpus_hooks(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, image_size: int, *, playground_per_kind: int = 10
) -> dict[str, Hook]:
    """Evaluations for `train_contrastive`, by name; every figure is a share in [0, 1].

    heldout_style  one picture a name in the emoji style never trained on. `top1`: names that were trained on in other
                   styles, told apart among all names of the style by "a photo of a {}."; `top1_ensemble`: the same with
                   the bare name added; `top1_new_names`: names never trained on in any style, told from each other
    playground     new pictures: `top1` of the kinds trained on, `top1_new_kinds` of those never seen, told from each
                   other, `top1_new_style` of the trained kinds in the style never seen; by "a photo of a {}."
    retrieval      recall at 1 both ways among 1,000 pictures of the held-out splits with distinct names
    """
    encode = _Encoder(tokenizer)
    return {
        "heldout_style": _heldout_style(corpus, encode, image_size),
        "playground": _playground(encode, image_size, playground_per_kind),
        "retrieval": _retrieval(corpus, encode, image_size),
    }


class _Encoder:
    """Features in batches, as the shipped model will give them (float32, all patches)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    @torch.no_grad()
    def images(self, model: CLIPModel, pixels: Tensor) -> Tensor:
        mean, std = torch.tensor(PIXEL_MEAN).view(3, 1, 1), torch.tensor(PIXEL_STD).view(3, 1, 1)
        features = []
        for batch in pixels.split(256):
            batch = (batch / 255 - mean) / std
            features.append(model.get_image_features(pixel_values=batch.to(model.device)).pooler_output.cpu())
        return normalize(torch.cat(features), dim=-1)

    @torch.no_grad()
    def texts(self, model: CLIPModel, texts: list[str]) -> Tensor:
        text: Any = model.config.text_config
        features = []
        for start in range(0, len(texts), 256):
            tokens = self.tokenizer(
                texts[start : start + 256],
                padding=True,
                truncation=True,
                max_length=text.max_position_embeddings,
                return_tensors="pt",
            )
            features.append(model.get_text_features(input_ids=tokens["input_ids"].to(model.device)).pooler_output.cpu())
        return normalize(torch.cat(features), dim=-1)


def _top1(images: Tensor, classes: Tensor, labels: Tensor) -> float:
    return ((images @ classes.T).argmax(1) == labels).float().mean().item()


def _one_per_name(corpus: Corpus, split: str) -> dict[str, int]:
    """Name -> its first picture in the held-out style, skin tones left aside."""
    chosen: dict[str, int] = {}
    for source in HELDOUT_SETS:
        for index in corpus.select(split, source=source):
            pair = corpus.pairs[index]
            if not any("skin tone" in text for text in pair["texts"]):
                chosen.setdefault(pair["name"], index)
    return chosen


def _heldout_style(corpus: Corpus, encode: _Encoder, image_size: int) -> Hook:
    trained, new = _one_per_name(corpus, "heldout-style"), _one_per_name(corpus, "heldout-name")
    names = [*trained, *new]
    pixels = corpus.views([*trained.values(), *new.values()], image_size)
    labels = torch.arange(len(names))

    def hook(model: CLIPModel) -> dict[str, Any]:
        images = encode.images(model, pixels)
        plain, bare = (encode.texts(model, [template.format(name) for name in names]) for template in TEMPLATES)
        n = len(trained)
        return {
            "top1": _top1(images[:n], plain, labels[:n]),
            "top1_ensemble": _top1(images[:n], normalize(plain + bare, dim=-1), labels[:n]),
            "top1_new_names": _top1(images[n:], plain[n:], labels[: len(new)]),
            "names": len(names),
            "new_names": len(new),
        }

    return hook


def _playground(encode: _Encoder, image_size: int, per_kind: int) -> Hook:
    from clipadapt.data.playground.drawing import HELDOUT_KINDS, HELDOUT_STYLE, KINDS, STYLES, Playground

    seen = [kind for kind in KINDS if kind not in HELDOUT_KINDS]
    styles = [style for style in STYLES if style != HELDOUT_STYLE]

    def draw(kinds: list[str], styles: list[str]) -> tuple[Tensor, Tensor, list[str]]:
        data = Playground(size=64, kinds=tuple(kinds), styles=tuple(styles), seed=1_000).dataset(per_kind, by="kind")
        pictures = [item.open().resize((image_size, image_size), 3) for item in data.items]  # 3: bicubic
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
        return pixels, torch.tensor(data.labels), data.class_names

    tasks = {
        "top1": draw(seen, styles),
        "top1_new_kinds": draw(list(HELDOUT_KINDS), styles),
        "top1_new_style": draw(seen, [HELDOUT_STYLE]),
    }

    def hook(model: CLIPModel) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for name, (pixels, labels, class_names) in tasks.items():
            classes = encode.texts(model, [TEMPLATES[0].format(class_name) for class_name in class_names])
            figures[name] = _top1(encode.images(model, pixels), classes, labels)
        return figures | {"kinds": len(seen), "new_kinds": len(HELDOUT_KINDS)}

    return hook


def _retrieval(corpus: Corpus, encode: _Encoder, image_size: int, count: int = 1_000) -> Hook:
    heldout = [*corpus.select("heldout-style"), *corpus.select("heldout-name")]
    order = np.random.default_rng(0).permutation(len(heldout))
    chosen: dict[str, int] = {}
    for position in order:
        chosen.setdefault(corpus.pairs[heldout[position]]["name"], heldout[position])
    texts, indices = list(chosen)[:count], list(chosen.values())[:count]
    pixels = corpus.views(indices, image_size)

    def hook(model: CLIPModel) -> dict[str, Any]:
        similarity = encode.images(model, pixels) @ encode.texts(model, texts).T  # (N, N)
        labels = torch.arange(len(texts))
        return {
            "image_to_text": (similarity.argmax(1) == labels).float().mean().item(),
            "text_to_image": (similarity.argmax(0) == labels).float().mean().item(),
            "pairs": len(texts),
        }

    return hook
