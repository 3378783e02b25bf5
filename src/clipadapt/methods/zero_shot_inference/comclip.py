"""ComCLIP: the sub-images of a caption's parts are added to the image, each by its likeness to its word.

    caption -> subject, predicate, object;   z_j = unit feature of part j's sub-image,  t_j = of its words
    w_j  = max(t_j z_j', 0) / sum_i max(t_i z_i', 0)
    score = s unit(x + sum_j w_j z_j) c'      x the whole image, c the caption

Jiang et al., "ComCLIP: Training-Free Compositional Image and Text Matching" (arXiv 2211.13854). Of the paper the
abstract was read; the rest is from the official repository eric-ai-lab/ComCLIP (`winoground/comclip.py` and
`helper_function.py`): an entity's sub-image is the image blacked out outside of its box (`subpicture="mask"`), the
predicate's shows both boxes, an entity that is not found has the whole image, the predicate too if one of the two is
not found; words are encoded as they are, attributes included, and weights are similarities divided by their sum.

Departures. The repository asks GPT-3.5 for the parts and for the dense captions (GRiT) that name them; here `parse` is
a small set of rules, or a `parser` of the caller's, and the names go to a detector, whose default, the backbone's own
patches, is ours. Similarities below zero count as zero and parts then equally, where the repository would divide by
whatever their sum is. Its scripts for other data sets add features that are not of unit length. `weights="equal"` is
the unweighted mean, the method's own baseline; "softmax" is what summaries of the paper speak of.

Class names are the captions. One without structure gets the score of plain CLIP.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from clipadapt.data.caption_parts import Parts, parse
from clipadapt.errors import ClipadaptError
from clipadapt.methods import Classifier, ImageMethod, hyper, method
from clipadapt.methods.kinds.images import DETECTOR, SeenImage, encode
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


def part_of(image: Image.Image, boxes: tuple[Box, ...], subpicture: str) -> Image.Image:
    """What of an image is in the boxes: the rest black, or the crop that holds all of them; no box is all of it."""
    if not boxes:
        return image
    if subpicture == "crop":
        lefts, tops, rights, bottoms = zip(*boxes, strict=True)
        return image.crop((min(lefts), min(tops), max(rights), max(bottoms)))
    out = Image.new("RGB", image.size)
    for box in boxes:
        out.paste(image.crop(box), box)
    return out


def in_pixels(box: Tensor) -> Box:
    """The whole pixels that a box (4,) touches."""
    left, top, right, bottom = box.tolist()
    return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)


def parsed(parser: Any, caption: str) -> Parts | None:
    """The parts of a caption by "rules" or by a caller's parser; None where there is no structure.

    Raises:
        ClipadaptError: the parser is neither, or answers something else.
    """
    if parser == "rules":
        return parse(caption)
    if not callable(parser):
        raise ClipadaptError(f'comclip: parser = {parser!r} is neither "rules" nor a callable.')
    parts = parser(caption)
    if parts is None:
        return None
    words = tuple(parts)
    if len(words) != 3 or not all(isinstance(w, str) and w for w in (words[0], words[2], words[1] or "none")):
        raise ClipadaptError(
            f"comclip: the parser must give (subject, predicate or None, object) or None for {caption!r}, not "
            f"{parts!r}."
        )
    return Parts(words[0], words[1] or None, words[2])


def regions(parts: Parts | None, boxes: Mapping[str, tuple[Box, ...]]) -> list[tuple[str, tuple[Box, ...]]]:
    """The words of each part of a caption and where it is in the image; () is everywhere."""
    if parts is None:
        return []
    subject, object_ = boxes[parts.subject], boxes[parts.object]
    out = [(parts.subject, subject), (parts.object, object_)]
    if parts.predicate:
        out.append((parts.predicate, tuple(sorted({*subject, *object_})) if subject and object_ else ()))
    return out


def composed(whole: Tensor, views: Tensor, words: Tensor, how: str, scale: float) -> Tensor:
    """(D,) the unit feature of an image (D,) with its n parts: features of these (n, D) and of their words (n, D)."""
    return normalize(whole + shares((views * words).sum(1), how, scale) @ views, dim=0)


@method(
    "comclip",
    title="ComCLIP: Training-Free Compositional Image and Text Matching",
    arxiv="2211.13854",
    problem="compositional image-text matching",
    new_classes=True,
)
class ComClip(ImageMethod, Classifier):
    """Matching of captions that say how things relate; class names are the captions.

    A thing that several captions name is looked for and encoded once per image.

    >>> model = create("comclip").fit(backbone, class_names=["a dog chasing a cat", "a cat chasing a dog"])
    >>> model.predict_proba(queries).shape
    (8, 2)
    """

    templates: Any = hyper("{}", "prompt templates of the captions, which are sentences already")
    detector: Any = hyper("saliency", f"what finds the things: {DETECTOR}")
    parser: Any = hyper(
        "rules", '"rules", or a callable caption -> (subject, predicate or None, object), or None without structure'
    )
    subpicture: str = hyper(
        "mask", "a thing's sub-image: black outside of its box (official code), or its crop", choices=("mask", "crop")
    )
    weights: str = hyper(
        "sum", "of the parts: similarity over its sum (official code), softmax of the scaled ones, or equal ones",
        choices=("sum", "softmax", "equal"),
    )  # fmt: skip

    def _name(self, backbone: Any) -> None:
        super()._name(backbone)
        self._detect = as_detector(self.detector, backbone)
        self._parts = [parsed(self.parser, caption) for caption in self.class_names_]  # C
        words = sorted({word for parts in self._parts if parts for word in parts if word})
        features = backbone.encode_texts(words).float().cpu() if words else ()
        self._words = dict(zip(words, features, strict=True))

    def _scores(self, backbone: Any, images: list[SeenImage]) -> Tensor:
        whole = encode(backbone, [one.pixels for one in images])  # (B, D)
        return torch.stack([matched(self, backbone, one.image, x) for one, x in zip(images, whole, strict=True)])


def matched(of: ComClip, backbone: Any, image: Image.Image, whole: Tensor) -> Tensor:
    """(C,) scores of one image, whose feature is `whole` (D,)."""
    things = sorted({word for parts in of._parts if parts for word in (parts.subject, parts.object)})
    found = detect(of._detect, image, things) if things else None
    best = {thing: found.of(i) for i, thing in enumerate(things)} if found else {}
    boxes = {thing: () if box is None else (in_pixels(box),) for thing, box in best.items()}
    wanted = [regions(parts, boxes) for parts in of._parts]  # per caption its parts
    distinct = sorted({where for each in wanted for _, where in each if where})
    views = encode(backbone, [part_of(image, where, of.subpicture) for where in distinct])
    feature = {(): whole, **dict(zip(distinct, views, strict=True))}
    seen = []
    for each in wanted:
        if each:
            parts = torch.stack([feature[where] for _, where in each])  # (n, D)
            words = torch.stack([of._words[word] for word, _ in each])  # (n, D)
            seen.append(composed(whole, parts, words, of.weights, backbone.logit_scale))
        else:
            seen.append(whole)
    return backbone.logit_scale * (torch.stack(seen) * of._texts).sum(1)
