"""ComCLIP: the sub-pictures of a caption's parts are added to the picture, each by its likeness to its word.

    caption -> subject, predicate, object;   z_j = unit feature of part j's sub-picture,  t_j = of its words
    w_j  = max(t_j z_j', 0) / sum_i max(t_i z_i', 0)
    score = s unit(x + sum_j w_j z_j) c'      x the whole picture, c the caption

Jiang et al., "ComCLIP: Training-Free Compositional Image and Text Matching" (arXiv 2211.13854). Of the paper the
abstract was read; the rest is from the official repository eric-ai-lab/ComCLIP (`winoground/comclip.py` and
`helper_function.py`): an entity's sub-picture is the picture blacked out outside of its box (`subpicture="mask"`), the
predicate's shows both boxes, an entity that is not found has the whole picture, the predicate too if one of the two is
not found; words are encoded as they are, attributes included, and weights are similarities divided by their sum.

Departures. The repository asks GPT-3.5 for the parts and for the dense captions (GRiT) that name them; here `parse` is
a small set of rules, or a `parser` of the caller's, and the names go to a detector, whose default, the backbone's own
patches, is ours. Similarities below zero count as zero and parts then equally, where the repository would divide by
whatever their sum is. Its scripts for other data sets add features that are not of unit length. `weights="equal"` is
the unweighted mean, the method's own baseline; "softmax" is what summaries of the paper speak of.

Class names are the captions. One without structure gets the score of plain CLIP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from clipadapt.backbones import Backbone
from clipadapt.data.caption_parts import Parts, parse
from clipadapt.errors import ClipadaptError
from clipadapt.methods.base import Card, hyper
from clipadapt.methods.picture_method import DETECTOR, Picture, PictureMethod, encode
from clipadapt.methods.registry import register
from clipadapt.sources.detectors import as_detector, detect


def shares(similarities: Tensor, how: str, scale: float) -> Tensor:
    """(n,) similarities of parts to their words -> their weights (n,), which sum to 1."""
    if how == "softmax":
        return (scale * similarities).softmax(0)
    positive = torch.ones_like(similarities) if how == "equal" else similarities.clamp(min=0)
    if positive.sum() == 0:
        positive = torch.ones_like(similarities)
    return positive / positive.sum()


Box = tuple[int, int, int, int]


def part_of(picture: Image.Image, boxes: tuple[Box, ...], subpicture: str) -> Image.Image:
    """What of a picture is in the boxes: the rest black, or the crop that holds all of them; no box is all of it."""
    if not boxes:
        return picture
    if subpicture == "crop":
        lefts, tops, rights, bottoms = zip(*boxes, strict=True)
        return picture.crop((min(lefts), min(tops), max(rights), max(bottoms)))
    out = Image.new("RGB", picture.size)
    for box in boxes:
        out.paste(picture.crop(box), box)
    return out


def _in_pixels(box: Tensor) -> Box:
    """The whole pixels that a box (4,) touches."""
    left, top, right, bottom = box.tolist()
    return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)


@register
@dataclass(kw_only=True)
class ComClip(PictureMethod):
    """Matching of captions that say how things relate; class names are the captions.

    A thing that several captions name is looked for and encoded once per picture.
    """

    templates: Any = hyper("{}", "prompt templates of the captions, which are sentences already")
    detector: Any = hyper("saliency", f"what finds the things: {DETECTOR}")
    parser: Any = hyper(
        "rules", '"rules", or a callable caption -> (subject, predicate or None, object), or None without structure'
    )
    subpicture: str = hyper(
        "mask", "a thing's sub-picture: black outside of its box (official code), or its crop", choices=("mask", "crop")
    )
    weights: str = hyper(
        "sum", "of the parts: similarity over its sum (official code), softmax of the scaled ones, or equal ones",
        choices=("sum", "softmax", "equal"),
    )  # fmt: skip

    card = Card(
        key="comclip",
        title="ComCLIP: Training-Free Compositional Image and Text Matching",
        arxiv="2211.13854",
        family="zero-shot-inference",
        task="compositional image-text matching",
        trains="nothing",
        signal="none",
        requires=frozenset({"texts"}),
        new_classes=True,
    )

    def _names(self, backbone: Backbone) -> None:
        super()._names(backbone)
        self._detect = as_detector(self.detector, backbone)
        self._parts = [self._parsed(caption) for caption in self.class_names_]  # C
        words = sorted({word for parts in self._parts if parts for word in parts if word})
        features = backbone.encode_texts(words).float().cpu() if words else ()
        self._words = dict(zip(words, features, strict=True))

    def _parsed(self, caption: str) -> Parts | None:
        if self.parser == "rules":
            return parse(caption)
        if not callable(self.parser):
            raise ClipadaptError(f'comclip: parser = {self.parser!r} is neither "rules" nor a callable.')
        parts = self.parser(caption)
        if parts is None:
            return None
        words = tuple(parts)
        if len(words) != 3 or not all(isinstance(w, str) and w for w in (words[0], words[2], words[1] or "none")):
            raise ClipadaptError(
                f"comclip: the parser must give (subject, predicate or None, object) or None for {caption!r}, not "
                f"{parts!r}."
            )
        return Parts(words[0], words[1] or None, words[2])

    def _scores(self, backbone: Backbone, pictures: list[Picture]) -> Tensor:
        whole = encode(backbone, [p.pixels for p in pictures])  # (B, D)
        return torch.stack([self._matched(backbone, p.image, x) for p, x in zip(pictures, whole, strict=True)])

    def _matched(self, backbone: Backbone, picture: Image.Image, whole: Tensor) -> Tensor:
        """(C,) scores of one picture, whose feature is `whole` (D,)."""
        things = sorted({word for parts in self._parts if parts for word in (parts.subject, parts.object)})
        boxes: dict[str, tuple[Box, ...]] = dict.fromkeys(things, ())
        if things:
            found = detect(self._detect, picture, things)
            best = {thing: found.of(i) for i, thing in enumerate(things)}
            boxes = {thing: () if box is None else (_in_pixels(box),) for thing, box in best.items()}
        regions = [self._regions(parts, boxes) if parts else [] for parts in self._parts]  # per caption its parts
        distinct = sorted({where for each in regions for _, where in each if where})
        views = encode(backbone, [part_of(picture, where, self.subpicture) for where in distinct])
        feature = {(): whole, **dict(zip(distinct, views, strict=True))}
        images = torch.stack([self._composed(whole, each, feature, backbone.logit_scale) for each in regions])  # (C, D)
        return backbone.logit_scale * (images * self._texts).sum(1)

    def _regions(self, parts: Parts, boxes: dict[str, tuple[Box, ...]]) -> list[tuple[str, tuple[Box, ...]]]:
        """The words of each part and where it is in the picture; () is everywhere."""
        subject, object_ = boxes[parts.subject], boxes[parts.object]
        out = [(parts.subject, subject), (parts.object, object_)]
        if parts.predicate:
            both = tuple(sorted({*subject, *object_})) if subject and object_ else ()
            out.append((parts.predicate, both))
        return out

    def _composed(
        self, whole: Tensor, regions: list[tuple[str, tuple[Box, ...]]], feature: dict[Any, Tensor], scale: float
    ) -> Tensor:
        """(D,) the unit feature of the picture with its parts; itself where there are none."""
        if not regions:
            return whole
        views = torch.stack([feature[where] for _, where in regions])  # (n, D)
        words = torch.stack([self._words[word] for word, _ in regions])  # (n, D)
        return normalize(whole + shares((views * words).sum(1), self.weights, scale) @ views, dim=0)
