"""FALIP: the class token is made to look at a region by a mask on its attention, and no pixel is changed.

    A_cls = softmax(q_cls K' / sqrt(d) + M)     in the last blocks, all heads; every other token attends as it did
    M_p   = strength (G_p - min G + e) / (max G - min G + e)  for patches p that the box touches, else 0
    G_p   = exp(-|p - middle|^2 / (2 sigma^2))                in patches, over the box alone

Zhuang et al., "FALIP: Visual Prompt as Foveal Attention Boosts CLIP Zero-Shot Performance" (arXiv 2407.05578). Of the
paper the abstract was read; formula and numbers are those of the official repository pumpkin805/FALIP (`executor.py`,
`clip/model.py`): strength 0.2, sigma 100 patches, e = 1e-6, the last 4 of ViT-B's 12 blocks. With so wide a sigma the
rescaled Gaussian is a paraboloid: 1 in the middle of the box, 0 at its corners.

Departures. The repository squashes images to a square; here the backbone's own transform is kept, and boxes are
carried through it. It computes the Gaussian in float32, where sigma 100 leaves three digits; here it is float64. The
last third of the blocks is masked in towers of other depths. Where a region comes from is the caller's choice:
`image_logits(images, boxes=)`, or `region`, in which "saliency" and "centre" are ours.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipadapt.backbones import Backbone
from clipadapt.backbones.preprocess import Preprocess
from clipadapt.errors import ClipadaptError
from clipadapt.methods import Classifier, ImageMethod, hyper, method, why_not
from clipadapt.methods.kinds.images import DETECTOR, SeenImage
from clipadapt.sources.detectors import as_detector, detect

_EPSILON = 1e-6


def foveal_mask(boxes: Tensor, grid: tuple[int, int], patch: int, *, strength: float, sigma: float) -> Tensor:
    """Boxes (n, 4) in pixels of the tower's input -> what is added to the class token's scores, (n, h * w).

    A box without area, such as one that the image transform has cut off, gives a mask of zeros.
    """
    masks = torch.zeros(len(boxes), *grid, dtype=torch.float64)
    for mask, box in zip(masks, boxes.double(), strict=True):
        if (box[2:] <= box[:2]).any():
            continue
        # cells (i, i + 1] of the official code: an edge that ends with a patch does not touch the next one
        last = torch.tensor([grid[1], grid[0]] * 2) - 1
        left, top, right, bottom = ((box / patch).ceil().long() - 1).clamp(min=0).minimum(last).tolist()
        y = torch.arange(bottom - top + 1, dtype=torch.float64) - (bottom - top) / 2
        x = torch.arange(right - left + 1, dtype=torch.float64) - (right - left) / 2
        gauss = (-(y[:, None] ** 2 + x**2) / (2 * sigma**2)).exp()
        low, high = gauss.aminmax()
        scaled = (gauss - low + _EPSILON) / (high - low + _EPSILON)  # 1 everywhere in a box of one patch
        mask[top : bottom + 1, left : right + 1] = strength * scaled
    return masks.flatten(1).float()


def on_pixels(boxes: Tensor, size: tuple[int, int], preprocess: Any) -> Tensor:
    """Boxes (n, 4) of an image of `size` (width, height) -> where the image's transform puts them."""
    if not isinstance(preprocess, Preprocess):
        raise ClipadaptError("falip needs a backbone whose image transform is known, to carry boxes through it.")
    width, height = size
    resized: tuple[float, float] = (width, height)
    if isinstance(preprocess.resize, int):
        factor = preprocess.resize / min(size)
        resized = (width * factor, height * factor)
    elif preprocess.resize is not None:
        resized = (preprocess.resize[1], preprocess.resize[0])
    crop = preprocess.crop or (resized[1], resized[0])
    scale = torch.tensor([resized[0] / width, resized[1] / height] * 2)
    offset = torch.tensor([(crop[1] - resized[0]) / 2, (crop[0] - resized[1]) / 2] * 2)
    return (boxes * scale + offset).clamp(min=0).minimum(torch.tensor([crop[1], crop[0]] * 2))


def encode_regions(
    backbone: Backbone, pixels: Tensor, boxes: Tensor, *, strength: float, sigma: float, layers: int | None
) -> Tensor:
    """Pixels (n, 3, H, W), each with the class token's eye on a box (n, 4) of these pixels -> unit features (n, D)."""
    depth = len(backbone.blocks("vision"))
    masked = min(layers or depth - 2 * depth // 3, depth)
    size = backbone.patch_size
    grid = (pixels.shape[2] // size, pixels.shape[3] // size)
    mask = foveal_mask(boxes, grid, size, strength=strength, sigma=sigma)
    tokens = 1 + mask.shape[1]
    bias = torch.zeros(len(pixels), 1, tokens, tokens)
    bias[:, 0, 0, 1:] = mask
    with backbone.attention(layers=range(depth - masked, depth), bias=bias):
        return backbone.encode_images(pixels).float().cpu()


def as_boxes(boxes: Any) -> Tensor:
    """Boxes as float (n, 4): left, top, right, bottom, with left < right and top < bottom."""
    out = torch.as_tensor(np.asarray(boxes, dtype=np.float32))
    if out.ndim != 2 or out.shape[1] != 4 or not out.isfinite().all() or not (out[:, 2:] > out[:, :2]).all():
        raise ClipadaptError("boxes must be (n, 4): left, top, right, bottom in pixels, left < right, top < bottom.")
    return out


@torch.no_grad()
def score_regions(
    backbone: Backbone,
    image: Image.Image,
    boxes: Any,
    texts: Sequence[str],
    *,
    strength: float = 0.2,
    sigma: float = 100.0,
    layers: int | None = None,
) -> Tensor:
    """How well each box fits each expression: logits (boxes, texts). The region of an expression is the best box.

    Args:
        backbone: with a class token and access to attention.
        image: in which the regions are.
        boxes: (n, 4) left, top, right, bottom in pixels of the image.
        texts: whole sentences; the official code puts "a photo of " before an expression.
        strength: height of the mask; 0 is plain CLIP.
        sigma: width of the Gaussian in patches.
        layers: how many of the last blocks are masked; the last third if None.

    Raises:
        ClipadaptError: the backbone lacks what is needed, or something is not a box.
    """
    if reason := why_not(Falip.card, backbone):
        raise ClipadaptError(reason)
    regions = on_pixels(as_boxes(boxes), image.size, backbone.preprocess)  # (n, 4)
    pixels = backbone.preprocess(image)
    features = [torch.empty(0, backbone.dim)]
    for some in regions.split(64) if len(regions) else ():
        batch = pixels.expand(len(some), -1, -1, -1)
        features.append(encode_regions(backbone, batch, some, strength=strength, sigma=sigma, layers=layers))
    return backbone.logit_scale * torch.cat(features) @ backbone.encode_texts(texts).float().cpu().T


@method(
    "falip",
    title="FALIP: Visual Prompt as Foveal Attention Boosts CLIP Zero-Shot Performance",
    arxiv="2407.05578",
    problem="zero-shot classification of regions, referring expressions",
    requires={"attention", "class-token", "texts"},
    new_classes=True,
)
class Falip(ImageMethod, Classifier):
    """Zero-shot classification with the class token's attention drawn to a region.

    The region is what `region` says, or the caller's: `model.image_logits(images, boxes=[(left, top, right, bottom),
    ...])`, one box an image. For expressions that refer to one of several regions see `score_regions`.

    >>> model = create("falip", region="centre").fit(backbone, class_names=["red", "blue"])
    >>> model.image_logits(queries)[0].shape
    torch.Size([8, 2])
    """

    region: Any = hyper("saliency", f'where it is: "centre" (the middle half), or what finds a class there: {DETECTOR}')
    strength: float = hyper(0.2, "height of the mask; 0 is plain CLIP (official code)", low=0)
    sigma: float = hyper(100.0, "width of the Gaussian in patches (official code)", low=0.01)
    layers: int | None = hyper(
        None, "how many of the last blocks are masked; the last third without, as in the official code", low=1
    )

    def _name(self, backbone: Any) -> None:
        super()._name(backbone)
        self._detect = None if self.region == "centre" else as_detector(self.region, backbone)

    def image_logits(
        self, images: Any, *, boxes: Any = None, on_error: str = "raise", progress: bool = False
    ) -> tuple[Tensor, list[int]]:
        """See `Classifier.image_logits`; `boxes` (N, 4), one for each image, replace what `region` would find."""
        self._fitted("backbone_")
        if boxes is None:
            return super().image_logits(images, on_error=on_error, progress=progress)
        return self._each(images, within(self, images, as_boxes(boxes)), on_error, progress)

    def _scores(self, backbone: Any, images: list[SeenImage]) -> Tensor:
        return looked_at(self, backbone, images, torch.stack([region_of(self, one.image) for one in images]))


def within(of: Falip, images: Any, boxes: Tensor) -> Callable[[Any, list[SeenImage]], Tensor]:
    """The scores of images with the region of each at the box (N, 4) that the caller gave."""
    count = len(images) if hasattr(images, "__len__") and not isinstance(images, str) else 1
    if len(boxes) != count:
        raise ClipadaptError(f"boxes must be one for each of the {count} images, not {len(boxes)}.")
    return lambda backbone, block: looked_at(of, backbone, block, boxes[[one.number for one in block]])


def looked_at(of: Falip, backbone: Any, images: list[SeenImage], boxes: Tensor) -> Tensor:
    """Logits (B, C) of images with the region at boxes (B, 4) of theirs."""
    placed = [
        box[None] if one.whole else on_pixels(box[None], one.image.size, backbone.preprocess)
        for one, box in zip(images, boxes, strict=True)
    ]
    pixels, places = torch.stack([one.pixels for one in images]), torch.cat(placed)
    features = encode_regions(backbone, pixels, places, strength=of.strength, sigma=of.sigma, layers=of.layers)
    return backbone.logit_scale * features @ of._texts.T


def region_of(of: Falip, image: Image.Image) -> Tensor:
    """(4,) the best box; the whole image where nothing is found."""
    width, height = image.size
    if of._detect is None:
        return torch.tensor([width / 4, height / 4, 3 * width / 4, 3 * height / 4])
    found = detect(of._detect, image, sorted(of.class_names_)).boxes
    return found[0] if len(found) else torch.tensor([0.0, 0.0, width, height])
