"""A pretrained two-tower model of transformers behind one interface, whatever its family."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, overload

import torch

from clipadapt.backbones.families import FAMILIES, Pretrained, TowerName, TowerParts
from clipadapt.backbones.image_tower import ImageTokens, ImageTower
from clipadapt.backbones.insertion import Insertion
from clipadapt.backbones.preprocess import Preprocess
from clipadapt.backbones.prompt_encoder import PromptEncoder
from clipadapt.backbones.surgery import inserted_tokens
from clipadapt.backbones.text_tower import TextTokens, TextTower
from clipadapt.backbones.two_towers import TwoTowers
from clipadapt.errors import BackboneError

_PROBES = ("", "A photo of a cat.", "it's 12 o'clock, 3/4 full", "naïve café 猫 😀", "x" * 40)


class Backbone(TwoTowers):
    """A frozen image tower and text tower that share one space; made by `clipadapt.load_backbone`.

    source      where it came from: a hub id, a folder, a file, or "embedded"
    family      "clip", "siglip", ... (a key of `families.FAMILIES`)
    model       the transformers model itself, in evaluation mode, no parameter asking for a gradient
    towers      its towers "text" and "vision"
    preprocess  PIL image -> (3, H, W) float32
    image_size  (height, width) that `preprocess` gives
    dim         D, length of a feature
    """

    def __init__(self, source: str, pretrained: Pretrained, device: str | torch.device = "cpu") -> None:
        model: Any = pretrained.model
        config, self.family, self.processor = model.config, pretrained.family, pretrained.processor
        self.dim = getattr(config.text_config, "projection_size", None) or config.projection_dim
        text = TextTower(model, self.family, pretrained.tokenizer, self.dim)
        super().__init__(source, model, [text, ImageTower(model, self.family, self.dim)], device)
        transform = Preprocess.from_config(pretrained.processor.to_dict())
        self.preprocess = transform
        size = transform.crop or transform.resize
        self.image_size = size if isinstance(size, tuple) else (config.vision_config.image_size,) * 2
        self.patch_size: int = config.vision_config.patch_size

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def _text(self) -> TextTower:
        return self.towers["text"]  # type: ignore[return-value]

    @property
    def _vision(self) -> ImageTower:
        return self.towers["vision"]  # type: ignore[return-value]

    @property
    def tokenizer(self) -> Any:
        return self._text.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._text.tokenizer = tokenizer

    @property
    def context_length(self) -> int:
        """Most tokens of a text, start and end included."""
        return self._text.context_length

    @property
    def capabilities(self) -> frozenset[str]:
        """What a method may ask for by name in its `requires`.

        texts        strings can be encoded (there is a tokenizer), not only token ids
        patches      features of patches in the joint space
        prompts      tokens can be put in at any layer of either tower
        attention    blocks can be made to attend in another way, and their maps be read
        gradients    encodings are differentiable, from pixels on
        weights      weights can be adapted (`target_modules`) and exported
        causal-text  a text's rows do not depend on later ones, so prefixes can be shared and ends cut
        class-token  row 0 of the image tower stands for the image; elsewhere a head pools the patches
        trunk        a convolutional trunk gives patches that can be kept (`encode_patches`)
        """
        has = {
            "texts": self.tokenizer is not None,
            "patches": True,
            "prompts": True,
            "attention": True,
            "gradients": True,
            "weights": True,
            "causal-text": FAMILIES[self.family].padding == "causal",
            "class-token": FAMILIES[self.family].class_token,
            "trunk": FAMILIES[self.family].trunk,
        }
        return frozenset(name for name, present in has.items() if present)

    def __repr__(self) -> str:
        return f"Backbone({self.source!r}, family={self.family!r}, dim={self.dim}, image_size={self.image_size})"

    # -- images -----------------------------------------------------------------------------------------------------

    @overload
    def encode_images(
        self, pixels: torch.Tensor, *, tokens: Literal[False] = False, normalize: bool = True
    ) -> torch.Tensor: ...

    @overload
    def encode_images(self, pixels: torch.Tensor, *, tokens: Literal[True], normalize: bool = True) -> ImageTokens: ...

    def encode_images(
        self, pixels: torch.Tensor, *, tokens: bool = False, normalize: bool = True
    ) -> torch.Tensor | ImageTokens:
        """Preprocessed pixels (B, 3, H, W) -> image features (B, D), of unit length unless `normalize` is off.

        H and W may differ from the trained size and from each other: positions are then interpolated (bicubic).
        With `tokens` an `ImageTokens` is returned. Gradients flow back to the pixels unless the caller stops them.
        """
        return self._vision.encode(pixels, tokens=tokens, normalize=normalize)

    def encode_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Preprocessed pixels (B, 3, H, W) -> patches (B, W, h, w), which `encode_images` takes in their place.

        What changes neither pixels nor trunk can keep them: the trunk is most of the work. Raises BackboneError where
        the image tower has no trunk.
        """
        return self._vision.patches(pixels)

    def project_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the image tower behind its last norm (B, N, W), such as `ImageTokens.inserted`, -> (B, N, D).

        A pooling head sees each row as if it were the whole image.
        """
        return self._vision.project_rows(rows)

    def project_images(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (B, L, W) as the last block of the image tower leaves them -> features (B, D), not normalised."""
        return self._vision.project(rows)

    # -- texts ------------------------------------------------------------------------------------------------------

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """T texts -> (T, L) int64, start and end included, filled with zeros behind the end.

        Texts are cleaned first (see `text.clean`); what exceeds `context_length` is cut, keeping the end token.
        """
        if isinstance(texts, str):
            raise BackboneError("Texts must be a list of strings; put the one string into a list.")
        if self.tokenizer is None:
            raise BackboneError(f"{self.source} has no tokenizer, so it encodes token ids only (encode_tokens).")
        return self._text.tokenize(texts)

    @overload
    def encode_tokens(
        self, ids: torch.Tensor, *, tokens: Literal[False] = False, normalize: bool = True
    ) -> torch.Tensor: ...

    @overload
    def encode_tokens(self, ids: torch.Tensor, *, tokens: Literal[True], normalize: bool = True) -> TextTokens: ...

    def encode_tokens(
        self, ids: torch.Tensor, *, tokens: bool = False, normalize: bool = True
    ) -> torch.Tensor | TextTokens:
        """Token ids (T, L) as `tokenize` gives them -> (T, D), of unit length unless `normalize` is off.

        Costs no more than the longest text of the batch needs, except where padding is attended to. With `tokens` a
        `TextTokens` is returned: each token's row goes through what otherwise only the pooled row goes through.
        """
        return self._text.encode(ids, tokens=tokens, normalize=normalize)

    @property
    def pad_id(self) -> int:
        """The token id that texts are padded with."""
        return self._text.pad_id

    def end_positions(self, ids: torch.Tensor) -> torch.Tensor:
        """(T, L) -> (T,) column of the first end token, where a causal text tower is pooled."""
        return self._text.end_positions(ids)

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (..., L) -> their vectors (..., L, W) before positions are added, to start prompts from words."""
        return self._text.embed(ids)

    def prompt_encoder(self, ids: torch.Tensor, *, memory: int = 2 << 30) -> PromptEncoder:
        """For prompts (C, L) that are encoded again and again with other tokens inserted; see `PromptEncoder`.

        memory  bytes that a call may keep for its backward pass; what exceeds them is computed twice instead
        """
        if ids.ndim != 2 or ids.dtype != torch.int64 or len(ids) == 0:
            raise BackboneError(f"Prompts must be (C, L) int64 with C >= 1, but are {tuple(ids.shape)} {ids.dtype}.")
        return PromptEncoder(self._text, ids, memory)

    def project_texts(self, rows: torch.Tensor) -> torch.Tensor:
        """Pooled rows (..., W) as the last block of a causal text tower leaves them -> features (..., D)."""
        return self._text.project(rows)

    # -- towers -----------------------------------------------------------------------------------------------------

    def tower(self, tower: TowerName) -> TowerParts:
        """Where the parts of a tower are, as dotted names; the tower itself is in `towers`."""
        return self._tower(tower).parts

    @contextmanager
    def inserted(self, *, text: Sequence[Insertion] = (), vision: Sequence[Insertion] = ()) -> Iterator[None]:
        """While it lasts, every encoding has these tokens put in (see `Insertion`); afterwards nothing remains."""
        with ExitStack() as stack:
            if text:
                stack.enter_context(inserted_tokens(self._text, text))
            if vision:
                stack.enter_context(inserted_tokens(self._vision, vision))
            yield

    # -- identity and files -----------------------------------------------------------------------------------------

    def _facts(self) -> tuple[Any, ...]:
        return *super()._facts(), self.context_length

    def _weights_begin(self, part: str) -> str | tuple[str, ...]:
        return ("vision_model.", "visual_projection.") if part == "vision" else ""

    def _settings(self, part: str) -> bytes:
        """How images and texts become inputs, and how the towers compute.

        The tokenizer counts by what it does, since its files change with library versions.
        """
        config, tokenizer = self.model.config, []
        facts: list[Any] = [repr(self.preprocess)]
        if part == "vision":
            facts += _computes(config.vision_config)
        else:
            if self.tokenizer is not None:
                sentences = self.tokenizer(list(_PROBES), truncation=True, max_length=self.context_length)["input_ids"]
                tokenizer = [sorted(self.tokenizer.get_vocab().items()), sentences]
            facts += [[_computes(config.vision_config), _computes(config.text_config)], tokenizer]
        if self._vision.fill is not None:
            facts.append(self._vision.fill)
        return json.dumps(facts).encode()

    def _files(self) -> Sequence[Any]:
        return self.model, self.processor, self.tokenizer


def _computes(config: Any) -> list[Any]:
    return [config.hidden_act, config.num_attention_heads, config.layer_norm_eps]
