"""`load_backbone`: one door for every kind of source."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from clipadapt.backbones.backbone import Backbone
from clipadapt.backbones.convert import SUFFIXES, load_checkpoint
from clipadapt.backbones.families import from_pretrained
from clipadapt.backbones.open_clip import PREFIX, load_open_clip
from clipadapt.errors import BackboneError

SHIPPED = {  # what `load_backbone` calls the models inside the package
    "embedded": Path(__file__).with_name("embedded"),
    "embedded-photos": Path(__file__).with_name("embedded_photos"),
}


def load_backbone(
    source: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    *,
    activation: str | None = None,
) -> Backbone:
    """Load a CLIP-like model, frozen and in float32.

    source      nothing or "embedded": the small model that ships with clipadapt, which knows drawings;
                "embedded-photos": the one that ships with it and knows photographs, slower;
                a hub id such as "openai/clip-vit-base-patch16", or a folder written by transformers;
                a file of weights in OpenAI's or OpenCLIP's ViT naming;
                "open_clip:MODEL/TAG" for what transformers has no class for (extra [open-clip], encoding only)
    device      where its weights go, e.g. "cpu" or "cuda"
    activation  only for a file of weights, which does not tell: "quick_gelu" (OpenAI, assumed without) or "gelu"

    Raises BackboneError naming the source when it is missing, incomplete, or of a family that is not known.
    """
    if activation is not None and (source is None or Path(source).suffix not in SUFFIXES):
        raise BackboneError(f"{source or 'The embedded model'} tells its activation; give none.")
    if source is None or str(source) in SHIPPED:
        name = "embedded" if source is None else str(source)
        if not (SHIPPED[name] / "config.json").is_file():
            raise BackboneError(f"This installation lacks the model {name!r}; give a hub id or a folder.")
        return Backbone(name, from_pretrained(str(SHIPPED[name])), device)
    if str(source).startswith(PREFIX):
        return load_open_clip(str(source), device)  # type: ignore[return-value]  # encodes as one, refuses the rest
    path = Path(source)
    if path.is_dir():
        return Backbone(str(path.resolve()), from_pretrained(str(path)), device)
    if path.suffix in SUFFIXES:
        return load_checkpoint(path.resolve(), activation, device)
    if path.is_absolute() or len(path.parts) > 2:  # a hub id has at most one slash
        raise BackboneError(f"There is no backbone at {path}: neither a folder nor a file of weights.")
    return Backbone(str(source), from_pretrained(str(source)), device)
