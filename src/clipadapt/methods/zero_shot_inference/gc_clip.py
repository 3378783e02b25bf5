"""GC-CLIP: CLIP's likeliest classes tell a detector what to look for, and the crop around what it finds is classified.

    S   = the k classes with the highest s x.T'           x the whole image
    b   = the detector's best box for the names of S
    b_m = b with each edge moved by a share m of its way to the image's edge, m in {0, ..., margin}
    x'  = unit(mean over m of unit(x of the crop b_m));   logits of S = s x' T_S'

Saranrittichai et al., "Zero-Shot Visual Classification with Guided Cropping" (arXiv 2309.06581). There is no official
code, and of the paper only the abstract could be read: that CLIP's top predictions are what the detector (OWL-ViT)
looks for, margins around the box and the mean over several crops are the method's; all numbers are ours.

Details that are ours as well. The box is widened to a square where the image has room, since the image tower sees
squares. Classes outside of S stay behind those in S, in the order and at the distances that the whole image gives
them. Where nothing is found the whole image is the crop. `view` replaces the box by one at the centre, or the crops
by random ones, which is what the method is compared with. The detector without a model of its own, "saliency", is
ours too. Of pixels that are given instead of images the crops are taken as they are, at their resolution.
"""

import math
import random
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from clipadapt.data.items import hash_bytes
from clipadapt.methods import Classifier, ImageMethod, hyper, method
from clipadapt.methods.kinds.images import DETECTOR, SeenImage, encode
from clipadapt.sources.detectors import as_detector, detect

Box = tuple[float, float, float, float]  # left, top, right, bottom


def squared(box: Box, width: int, height: int) -> Box:
    """The box widened to a square around its middle, moved and at last cut where the image ends."""
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    x, y = (
        min(max((low + high - side) / 2, 0), max(end - side, 0))
        for low, high, end in ((left, right, width), (top, bottom, height))
    )
    return x, y, min(x + side, width), min(y + side, height)


def widened(box: Box, margin: float, width: int, height: int) -> tuple[int, int, int, int]:
    """The box with a margin from 0 (tight) to 1 (the whole image), in whole pixels, at least one each way."""
    left, top, right, bottom = box
    x, y = min(math.floor(left * (1 - margin)), width - 1), min(math.floor(top * (1 - margin)), height - 1)
    x_end, y_end = math.ceil(right + margin * (width - right)), math.ceil(bottom + margin * (height - bottom))
    return x, y, min(max(x_end, x + 1), width), min(max(y_end, y + 1), height)


def reclassified(whole: Tensor, crops: Tensor, shortlist: Tensor) -> Tensor:
    """Logits (N, C) of whole images with those of the shortlist (N, k) replaced by the crops' (N, k).

    The others are lowered as far as the lowest of the shortlist falls, so they stay as far behind it as they were.
    """
    drop = (whole.gather(1, shortlist).amin(1) - crops.amin(1)).clamp(min=0)  # (N,)
    return (whole - drop[:, None]).scatter(1, shortlist, crops)


def anywhere(image: Image.Image, key: str) -> tuple[int, int, int, int]:
    """A square of 30 % to all of the shorter side; it depends on the key alone."""
    rng = random.Random(key)
    side = max(round(rng.uniform(0.3, 1) * min(image.size)), 1)
    x, y = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
    return x, y, x + side, y + side


def boxes_of(of: Any, image: Image.Image, names: list[str]) -> list[tuple[int, int, int, int]]:
    """The crops of an image in which one of the names is looked for, the tightest first."""
    width, height = image.size
    if of.view == "random":
        return [anywhere(image, f"{hash_bytes(image.tobytes())} {of.seed} {i}") for i in range(of.crops)]
    box: Box = (width / 4, height / 4, 3 * width / 4, 3 * height / 4)
    if of.view == "guided":
        found = detect(of._detect, image, names).boxes  # (n, 4)
        left, top, right, bottom = found[0].tolist() if len(found) else (0, 0, width, height)
        box = (left, top, right, bottom)
    margins = [of.margin * i / (of.crops - 1) for i in range(of.crops)] if of.crops > 1 else [of.margin]
    square = squared(box, width, height)
    return [widened(square, margin, width, height) for margin in margins]


@method(
    "gc-clip",
    title="Zero-Shot Visual Classification with Guided Cropping",
    arxiv="2309.06581",
    problem="zero-shot classification of small objects",
    new_classes=True,
)
class GCClip(ImageMethod, Classifier):
    """Zero-shot classification of the crop that a detector finds; best where objects are small.

    >>> model = create("gc-clip", k=2).fit(backbone, class_names=["red", "green", "blue"])
    >>> model.predict_proba(queries).shape
    (8, 3)
    """

    detector: Any = hyper("saliency", f"what finds the box: {DETECTOR}")
    k: int = hyper(5, "classes on the shortlist, which alone are reclassified", low=1)
    crops: int = hyper(4, "crops averaged, with margins from 0 to `margin`", low=1)
    margin: float = hyper(0.3, "largest margin: 0 is the tight box, 1 the whole image", low=0, high=1)
    view: str = hyper(
        "guided", "where the crops are: around the box, around the image's middle half, or anywhere at random",
        choices=("guided", "centre", "random"),
    )  # fmt: skip
    seed: int = hyper(1, "of random crops")

    def _name(self, backbone: Any) -> None:
        super()._name(backbone)
        self._detect = as_detector(self.detector, backbone)

    def _scores(self, backbone: Any, images: list[SeenImage]) -> Tensor:
        whole = backbone.logit_scale * encode(backbone, [one.pixels for one in images]) @ self._texts.T  # (B, C)
        shortlist = whole.topk(min(self.k, whole.shape[1])).indices  # (B, k), likeliest first
        views = [
            [one.image.crop(box) for box in boxes_of(self, one.image, [self.class_names_[c] for c in row])]
            for one, row in zip(images, shortlist.tolist(), strict=True)
        ]
        features = encode(backbone, [view for each in views for view in each]).split([len(each) for each in views])
        means = normalize(torch.stack([each.mean(0) for each in features]), dim=1)  # (B, D)
        crops = backbone.logit_scale * (self._texts[shortlist] @ means[:, :, None])[..., 0]  # (B, k)
        return reclassified(whole, crops, shortlist)
