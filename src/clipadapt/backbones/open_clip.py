"""What transformers has no class for (ResNets, ConvNeXt, PE, EVA, CoCa ...), through OpenCLIP: encoding only."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from clipadapt.backbones.families import first_line
from clipadapt.backbones.two_towers import TwoTowers
from clipadapt.errors import BackboneError

PREFIX = "open_clip:"


def load_open_clip(source: str, device: str | torch.device) -> OpenClipBackbone:
    """Load "open_clip:MODEL/TAG", e.g. "open_clip:RN50/openai", or "open_clip:MODEL/path/to/weights".

    Raises BackboneError where the extra is not installed, or OpenCLIP knows no such model or weights.
    """
    try:
        import open_clip
    except ImportError as error:
        raise BackboneError(f"{source} needs OpenCLIP; install it with: pip install 'clipadapt[open-clip]'.") from error
    name, _, weights = source.removeprefix(PREFIX).partition("/")
    if not name or not weights:
        raise BackboneError(f"{source} must name a model and its weights, as in 'open_clip:RN50/openai'.")
    try:
        model, transform = open_clip.create_model_from_pretrained(name, pretrained=weights, device=device)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, OSError, ValueError) as error:
        raise BackboneError(f"OpenCLIP cannot load {source}: {first_line(error)}") from error
    return OpenClipBackbone(source, model, transform, tokenizer)


class OpenClipBackbone(TwoTowers):
    """Encodes images and texts as a `Backbone` does, and refuses everything else by name.

    Preprocessing, text cleaning and tokens are OpenCLIP's own; texts always run at their full context length.
    """

    def __init__(self, source: str, model: Any, transform: Callable[..., torch.Tensor], tokenizer: Any) -> None:
        super().__init__(source, model, towers=())
        self.family, self.processor = "open_clip", None
        self.tokenizer, self.preprocess = tokenizer, transform
        size = model.visual.image_size
        self.image_size = (size, size) if isinstance(size, int) else (size[0], size[1])
        with torch.no_grad():
            self.dim = self.encode_texts(["a"]).shape[1]

    def __repr__(self) -> str:
        return f"OpenClipBackbone({self.source!r}, dim={self.dim}, image_size={self.image_size})"

    @property
    def context_length(self) -> int:
        """Tokens of every text, start, end and padding included."""
        return self.model.context_length

    @property
    def capabilities(self) -> frozenset[str]:
        """What a method may ask for, as `Backbone.capabilities`."""
        return frozenset({"texts", "gradients"})

    def encode_images(self, pixels: torch.Tensor, *, tokens: bool = False, normalize: bool = True) -> Any:
        """Preprocessed pixels (B, 3, H, W) -> image features (B, D), of unit length unless `normalize` is off."""
        if tokens:
            self._refuse("patch tokens")
        return self.model.encode_image(pixels.to(self.device), normalize=normalize)

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """T texts -> token ids (T, L) int64, filled up to the context length."""
        return self.tokenizer(list(texts)) if texts else torch.zeros(0, self.context_length, dtype=torch.int64)

    def encode_tokens(self, ids: torch.Tensor, *, tokens: bool = False, normalize: bool = True) -> Any:
        """Token ids (T, L) as `tokenize` gives them -> (T, D), of unit length unless `normalize` is off."""
        if tokens:
            self._refuse("features of a text's tokens")
        if ids.shape[0] == 0:
            return torch.zeros(0, self.dim, device=self.device)
        full = nn.functional.pad(ids, (0, self.context_length - ids.shape[1])).to(self.device)  # (T, context)
        return self.model.encode_text(full, normalize=normalize)

    def save(self, folder: str | os.PathLike[str]) -> NoReturn:
        self._refuse("export as a transformers folder")

    def _weights_begin(self, part: str) -> str | tuple[str, ...]:
        return "visual." if part == "vision" else ""

    def _settings(self, part: str) -> bytes:
        facts = [self.source, self.model.visual.preprocess_cfg]
        if part != "vision":
            facts.append(self.tokenize(["A photo of a cat."]).tolist())
        return repr(facts).encode()

    def _tower(self, name: str) -> NoReturn:
        self._refuse("access to the towers' blocks")

    def _absent(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("access to the towers' blocks")

    tower = inserted = prompt_encoder = project_rows = project_images = project_texts = _absent
    embed_tokens = end_positions = _absent

    def _refuse(self, what: str) -> NoReturn:
        raise BackboneError(f"{self.source} comes through OpenCLIP, which encodes only: it has no {what}.")
