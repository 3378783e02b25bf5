"""Where in an image are the things named? Open-vocabulary detectors of `transformers`, and one without a model.

A detector is any callable (image, names) -> boxes (n, 4), scores (n,), which name (n,): see `Detections`. Methods call
it through `detect`, so a caller's own may answer in lists, numpy or torch, in any order.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import max_pool2d, normalize

from clipadapt.backbones import Backbone
from clipadapt.backbones.families import first_line, load_tokenizer, quiet
from clipadapt.backbones.preprocess import Preprocess
from clipadapt.errors import BackboneError, ClipadaptError


class Detections(NamedTuple):
    """What was found in an image, best first.

    Attributes:
        boxes: (n, 4) float32: left, top, right, bottom in pixels of the image.
        scores: (n,) float32.
        names: (n,) int64: positions in the list of names.
    """

    boxes: Tensor
    scores: Tensor
    names: Tensor

    def of(self, name: int) -> Tensor | None:
        """The best box (4,) of a name, or None if it was not found."""
        rows = (self.names == name).nonzero()
        return self.boxes[rows[0, 0]] if len(rows) else None


Detector = Callable[[Image.Image, Sequence[str]], tuple[Any, Any, Any]]


def detect(detector: Detector, image: Image.Image, names: Sequence[str]) -> Detections:
    """What `detector` finds, checked: boxes are cut to the image and left out where nothing of them remains.

    Raises:
        ClipadaptError: the answer is not three arrays of n rows, or a box or score is not finite.
    """
    try:
        boxes, scores, which = (
            part.detach().cpu() if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
            for part in detector(image, names)
        )
    except (TypeError, ValueError) as error:
        raise ClipadaptError(
            f"A detector must return three arrays, boxes (n, 4), scores (n,) and names (n,): {first_line(error)}"
        ) from error
    boxes, scores = boxes.float().reshape(-1, 4) if boxes.numel() == 0 else boxes.float(), scores.float()
    if boxes.shape != (len(scores), 4) or which.shape != (len(scores),) or scores.ndim != 1:
        raise ClipadaptError(
            f"A detector must return boxes (n, 4), scores (n,) and names (n,), not "
            f"{tuple(boxes.shape)}, {tuple(scores.shape)} and {tuple(which.shape)}."
        )
    if not (boxes.isfinite().all() and scores.isfinite().all()):
        raise ClipadaptError("A detector returned a box or score that is not finite.")
    if len(which) and (which.is_floating_point() or int(which.min()) < 0 or int(which.max()) >= len(names)):
        raise ClipadaptError(
            f"A detector's names must be ints from 0 to {len(names) - 1}, positions in the list of names."
        )
    return _clip_and_sort(image, boxes, scores, which.long())


def _clip_and_sort(image: Image.Image, boxes: Tensor, scores: Tensor, names: Tensor) -> Detections:
    """Best first, ties as they came; boxes clipped to the image; empty ones are dropped."""
    boxes = boxes.clamp(min=0).minimum(torch.tensor([image.width, image.height] * 2))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero()[:, 0]
    order = kept[scores[kept].sort(descending=True, stable=True).indices]
    return Detections(boxes[order], scores[order], names[order])


def as_detector(value: Any, backbone: Backbone) -> Detector:
    """The detector given by `value`.

    Args:
        value: "saliency", the patches of `backbone`; another string or a path, the hub id or folder of a
            `ZeroShotDetector`; or a `Detector`, which stays as it is.
        backbone: what "saliency" looks with, and where a model is put.

    Raises:
        BackboneError: "saliency" needs what the backbone lacks.
        ClipadaptError: it is something else.
    """
    if isinstance(value, str | os.PathLike):
        return Saliency(backbone) if value == Saliency.name else ZeroShotDetector(value, device=backbone.device)
    if callable(value) and not isinstance(value, type):
        return value
    raise ClipadaptError(
        'A detector is "saliency", a hub id or folder, or a callable (image, names) -> boxes, scores, names, '
        f"not {value!r}."
    )


# -- detectors of transformers ---------------------------------------------------------------------------------------


@dataclass
class ZeroShotDetector:
    """An open-vocabulary detector of `transformers`, loaded when it is first called.

    Every pair of a box and a name is a detection, so that each name has its best box, even where another name suits
    that box better.

    Args:
        source: hub id or folder of an OWL-ViT, OWLv2, Grounding DINO or MM Grounding DINO.
        device: where it runs.
        threshold: least score, in [0, 1]; at 0 everything counts, and each name has a box.
        template: words around a name; without it the form that the family was trained on: "a photo of a {}" for OWL,
            the lower-case name and a full stop for Grounding DINO.

    Raises:
        BackboneError: when called, if the source is missing, incomplete, or of an unknown family.
    """

    source: str | os.PathLike[str]
    device: str | torch.device = "cpu"
    threshold: float = 0.0
    template: str | None = None

    @property
    def name(self) -> str:
        """The hub id or folder."""
        return os.fspath(self.source)

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        """Model, image processor and tokenizer."""
        source = self.name
        try:
            with quiet():
                kind = transformers.AutoConfig.from_pretrained(source).model_type
                if kind not in _FAMILIES:
                    raise BackboneError(
                        f"{source} holds a model of type {kind!r}; known detectors are {', '.join(_FAMILIES)}."
                    )
                model, report = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(
                    source, dtype=torch.float32, output_loading_info=True
                )
                processor = transformers.AutoImageProcessor.from_pretrained(source, backend="pil")
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise BackboneError(f"{source} cannot be loaded as a detector: {first_line(error)}") from error
        if report["missing_keys"]:
            raise BackboneError(f"{source} lacks weights of its model, for example {min(report['missing_keys'])!r}.")
        return model.eval().requires_grad_(False).to(self.device), processor, load_tokenizer(source)

    @torch.no_grad()
    def __call__(self, image: Image.Image, names: Sequence[str]) -> Detections:
        model, processor, _ = self._parts
        if not names:
            return _nothing()
        family = model.config.model_type
        pixels = processor(images=[image.convert("RGB")], return_tensors="pt")
        scores, boxes = _FAMILIES[family](self, {k: v.to(model.device) for k, v in pixels.items()}, names)
        width, height = image.size
        if family == "owlv2":  # sees the image in the upper left corner of a square
            width = height = max(image.size)
        centre, size = boxes[:, :2].cpu(), boxes[:, 2:].cpu()  # shares of the image
        boxes = torch.cat([centre - size / 2, centre + size / 2], 1) * torch.tensor([width, height] * 2)  # (Q, 4)
        rows, which = (scores.cpu() >= self.threshold).nonzero(as_tuple=True)
        return _clip_and_sort(image, boxes[rows], scores.cpu()[rows, which], which)

    def _owl(self, pixels: dict[str, Tensor], names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Scores (Q, T) of Q boxes for T names, and the boxes (Q, 4)."""
        model, _, tokenizer = self._parts
        template = self.template or "a photo of a {}"
        length = model.config.text_config.max_position_embeddings
        texts = tokenizer(
            [template.format(name) for name in names],
            padding="max_length", truncation=True, max_length=length, return_tensors="pt",
        ).to(model.device)  # fmt: skip
        out = model(
            pixel_values=pixels["pixel_values"], input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]
        )
        return out.logits[0].sigmoid(), out.pred_boxes[0]

    def _grounding(self, pixels: dict[str, Tensor], names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The same; a name's score is that of its best word, as in the official post-processing."""
        model, _, tokenizer = self._parts
        template = self.template or "{}."
        phrases = [template.format(name.strip().strip(".").lower()) for name in names]
        starts = np.cumsum([0, *(len(phrase) + 1 for phrase in phrases)])
        text = tokenizer(" ".join(phrases), return_offsets_mapping=True, return_tensors="pt")
        spans = text.pop("offset_mapping")[0]  # (L, 2) characters; (0, 0) for special tokens
        if len(spans) > model.config.max_text_len:
            raise ClipadaptError(
                f"{self.source} reads at most {model.config.max_text_len} tokens, and {len(names)} names have "
                f"{len(spans)}: ask for fewer."
            )
        out = model(**pixels, **text.to(model.device))
        scores = out.logits[0, :, : len(spans)].sigmoid()  # (Q, L)
        named = [
            (spans[:, 1] > spans[:, 0]) & (spans[:, 0] >= start) & (spans[:, 1] <= start + len(phrase.rstrip(". ")))
            for start, phrase in zip(starts, phrases, strict=False)
        ]
        blank = [name for name, tokens in zip(names, named, strict=True) if not tokens.any()]
        if blank:
            raise ClipadaptError(f"{self.source} cannot look for the blank name {blank[0]!r}.")
        return torch.stack([scores[:, tokens.to(scores.device)].amax(1) for tokens in named], 1), out.pred_boxes[0]


_FAMILIES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "owlvit": ZeroShotDetector._owl,
    "owlv2": ZeroShotDetector._owl,
    "grounding-dino": ZeroShotDetector._grounding,
    "mm-grounding-dino": ZeroShotDetector._grounding,
}


def _nothing() -> Detections:
    return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))


# -- the backbone itself ----------------------------------------------------------------------------------------------


def components(mask: Tensor) -> list[Tensor]:
    """The parts of (h, w) bool that are connected over the four neighbours, each (h, w) bool, upper left first."""
    number = torch.arange(1, mask.numel() + 1, dtype=torch.float64).view(1, *mask.shape) * mask  # (1, h, w)
    while True:
        grown = max_pool2d(number, (3, 1), 1, (1, 0)).maximum(max_pool2d(number, (1, 3), 1, (0, 1))) * mask
        if torch.equal(grown, number):
            break
        number = grown
    parts = [number[0] == value for value in number.unique().tolist() if value]
    return sorted(parts, key=lambda part: int(part.flatten().nonzero()[0, 0]))


class Saliency:
    """A detector without a separate model: regions of a backbone's patches, named by their similarity to the texts.

        odd_p   = 1 - cos(x_p, mean x)       patch features x of the last block with q-q and k-k attention
        regions = connected parts of {p : odd_p, scaled to [0, 1] over the image, >= threshold}
        score   = mean over the region's patches of cos(x_p, text of the name)

    Every pair of a region and a name is a detection. Boxes are as coarse as patches, touching things are one region,
    and an image without background has no good one: a stand-in for where no detector is available. The whole image is
    looked at, in its own shape and with `zoom` squared times as many patches as the backbone was trained on.

    Args:
        backbone: what looks.
        threshold: of the regions, in (0, 1).
        zoom: 1 is the trained resolution.
        template: words around a name.

    Raises:
        BackboneError: the backbone has no patch features, no access to attention or no tokenizer.
    """

    name: ClassVar[str] = "saliency"

    def __init__(
        self, backbone: Backbone, *, threshold: float = 0.3, zoom: float = 2.0, template: str = "a photo of a {}."
    ) -> None:
        missing = {"attention", "patches", "texts"} - backbone.capabilities
        if missing or not isinstance(backbone.preprocess, Preprocess):
            lacks = ", ".join(sorted(missing)) or "an image transform that can be resized"
            raise BackboneError(f"Saliency needs {lacks}, which {backbone.source} lacks; name another detector.")
        self.backbone, self.threshold, self.zoom, self.template = backbone, threshold, zoom, template
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, image: Image.Image, names: Sequence[str]) -> Detections:
        patches = self.patches(image)  # (h, w, D)
        height, width = patches.shape[:2]
        oddness = 1 - patches @ normalize(patches.mean((0, 1)), dim=0)  # (h, w)
        low, high = oddness.aminmax()
        regions = components((oddness - low) >= self.threshold * (high - low))
        if not names:
            return _nothing()
        likeness = patches @ self.texts(names).T  # (h, w, T)
        scores = torch.stack([likeness[region].mean(0) for region in regions])  # (R, T)
        scale = torch.tensor([image.width / width, image.height / height] * 2)
        boxes = torch.stack([_bounds(region) for region in regions]) * scale  # (R, 4)
        rows = torch.arange(len(regions)).repeat_interleave(len(names))
        return _clip_and_sort(image, boxes[rows], scores.flatten(), torch.arange(len(names)).repeat(len(regions)))

    def patches(self, image: Image.Image) -> Tensor:
        """Unit features of an image's patches, (h, w, D) on the CPU."""
        size, backbone = self.backbone.patch_size, self.backbone
        count = self.zoom**2 * backbone.image_size[0] * backbone.image_size[1] / size**2
        rows = min(max(round(math.sqrt(count * image.height / image.width)), 1), round(count))
        columns = max(round(count / rows), 1)
        whole = dataclasses.replace(backbone.preprocess, resize=(rows * size, columns * size), crop=None)  # type: ignore[type-var]
        with backbone.attention("qq+kk"):
            encoded = backbone.encode_images(whole(image)[None], tokens=True)
        return encoded.patches[0].view(*encoded.grid, -1).float().cpu()

    def texts(self, names: Sequence[str]) -> Tensor:
        """Unit features of names, (T, D) on the CPU; each is encoded once."""
        new = [name for name in dict.fromkeys(names) if name not in self._texts]
        if new:
            features = self.backbone.encode_texts([self.template.format(name) for name in new]).float().cpu()
            self._texts |= dict(zip(new, features, strict=True))
        return torch.stack([self._texts[name] for name in names])


def _bounds(region: Tensor) -> Tensor:
    """(h, w) bool -> left, top, right, bottom in cells."""
    rows, columns = region.any(1).nonzero()[:, 0], region.any(0).nonzero()[:, 0]
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
