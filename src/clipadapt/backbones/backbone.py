"""A pretrained two-tower model behind one interface, whatever its family."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, overload

import torch
from PIL import Image
from torch import nn

from clipadapt.backbones.families import FAMILIES, Pretrained, Tower, TowerName, quiet, submodule
from clipadapt.backbones.preprocess import Preprocess
from clipadapt.backbones.prompt_encoder import PromptEncoder
from clipadapt.backbones.surgery import Insertion, PromptedRows, changed_attention, inserted_tokens, rows_after_blocks
from clipadapt.backbones.text import clean
from clipadapt.errors import BackboneError, unknown_name

KINDS = ("q", "k", "v", "o", "fc1", "fc2")
_PROBES = ("", "A photo of a cat.", "it's 12 o'clock, 3/4 full", "naïve café 猫 😀", "x" * 40)


@dataclass(frozen=True)
class ImageTokens:
    """What `encode_images(pixels, tokens=True)` gives.

    pooled    (B, D) the image features
    patches   (B, N, D) one feature per patch in the same joint space, row by row over `grid`
    grid      (h, w), h * w = N
    inserted  (B, n, W) rows put in by `Backbone.inserted`, after the tower's last norm and before any projection
    """

    pooled: torch.Tensor
    patches: torch.Tensor
    grid: tuple[int, int]
    inserted: torch.Tensor


@dataclass(frozen=True)
class TextTokens:
    """What `encode_tokens(ids, tokens=True)` gives.

    pooled  (T, D) the text features
    tokens  (T, L', D) one feature for each token in the same joint space; L' is the length of the longest text
    mask    (T, L') bool: true for a text's tokens, start and end included (but no end token that is also the padding,
            as SigLIP's); what stands in the other rows means nothing
    """

    pooled: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor


class Backbone:
    """A frozen image tower and text tower that share one space; made by `clipadapt.load_backbone`.

    source        where it came from: a hub id, a folder, a file, or "embedded"
    family        "clip", "siglip", ... (a key of `families.FAMILIES`)
    model         the transformers model itself, in evaluation mode, no parameter asking for a gradient
    preprocess    PIL picture -> (3, H, W) float32
    image_size    (height, width) that `preprocess` gives
    dim           D, length of a feature
    """

    aligned: ClassVar[bool] = True  # image and text features live in one space
    _image_weights: ClassVar[tuple[str, ...]] = ("vision_model.", "visual_projection.")  # how their names begin

    def __init__(self, source: str, pretrained: Pretrained, device: str | torch.device = "cpu") -> None:
        self.source = source
        self.family = pretrained.family
        self.model: Any = pretrained.model.eval().requires_grad_(False).to(device)
        self.processor = pretrained.processor
        self.tokenizer = pretrained.tokenizer
        transform = Preprocess.from_config(pretrained.processor.to_dict())
        self.preprocess: Callable[[Image.Image], torch.Tensor] = transform
        self._family = FAMILIES[self.family]
        self.prompted: dict[TowerName, PromptedRows] = {}  # filled while `inserted` lasts
        self.watched: list[TowerName] = []  # towers in which `after_blocks` is at work
        self._known: tuple[Any, tuple[str, str]] | None = None  # state of the weights, its two fingerprints
        config = self.model.config
        size = transform.crop or transform.resize
        square = (config.vision_config.image_size,) * 2
        self.image_size: tuple[int, int] = size if isinstance(size, tuple) else square
        self.patch_size: int = config.vision_config.patch_size
        self.dim: int = getattr(config.text_config, "projection_size", None) or config.projection_dim

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def logit_scale(self) -> float:
        """The learned factor on cosines, e.g. 100.0.

        Its parameter is a scalar in most families, which FSDP2 cannot shard: name it in `ignored_params`.
        """
        return float(self.model.logit_scale.detach().exp())

    @property
    def logit_bias(self) -> float:
        """Added after the factor; 0 except for models trained with the sigmoid loss."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else float(bias.detach())

    @property
    def context_length(self) -> int:
        """Most tokens of a text, start and end included."""
        longest = self.model.config.text_config.max_position_embeddings - self._family.position_offset
        return min(longest, getattr(self.tokenizer, "model_max_length", longest))

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
        class-token  row 0 of the image tower stands for the picture; elsewhere a head pools the patches
        """
        has = {
            "texts": self.tokenizer is not None,
            "patches": True,
            "prompts": True,
            "attention": True,
            "gradients": True,
            "weights": True,
            "causal-text": self._family.padding == "causal",
            "class-token": self._family.class_token,
        }
        return frozenset(name for name, present in has.items() if present)

    def __repr__(self) -> str:
        return f"Backbone({self.source!r}, family={self.family!r}, dim={self.dim}, image_size={self.image_size})"

    # -- encoding ---------------------------------------------------------------------------------------------------

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
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise BackboneError(f"Pixels must be (B, 3, H, W), but are {tuple(pixels.shape)}.")
        grid = (pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size)
        if not all(grid):
            raise BackboneError(
                f"Pictures of {tuple(pixels.shape[2:])} pixels are smaller than one patch of {self.patch_size}."
            )
        if pixels.shape[0] == 0:
            none = torch.zeros(0, grid[0] * grid[1], self.dim, device=self.device)
            return ImageTokens(none[:, 0], none, grid, none[:, :0]) if tokens else none[:, 0]
        pixels = pixels.to(self.device)
        if self._family.patchified:
            output = self.model.get_image_features(**_patchify(pixels, self.patch_size))
        else:
            output = self.model.get_image_features(pixels, interpolate_pos_encoding=True)
        pooled = output.pooler_output  # (B, D)
        if not tokens:
            return _unit(pooled, normalize)
        norm = submodule(self.model, self._family.vision.norm)
        rows = output.last_hidden_state  # (B, 1 + N, W), or (B, N, W) already normed
        patches = self.project_rows(norm(rows[:, 1:]) if self._family.class_token else rows)
        prompted = self.prompted.get("vision")
        taken = rows[:, :0] if prompted is None or prompted.taken is None else prompted.taken
        return ImageTokens(_unit(pooled, normalize), _unit(patches, normalize), grid, norm(taken))

    def prepare(self, item: Any) -> torch.Tensor:
        """A `clipadapt.data` item -> pixels (3, H, W): decoded and transformed."""
        return self.preprocess(item.open())

    def encode(self, batch: torch.Tensor) -> torch.Tensor:
        """As `encode_images`, under the name that every encoder has."""
        return self.encode_images(batch)

    def project_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the image tower behind its last norm (B, N, W), such as `ImageTokens.inserted`, -> (B, N, D).

        A pooling head sees each row as if it were the whole picture.
        """
        if self._family.class_token:
            return self.model.visual_projection(rows)
        alone = rows.reshape(-1, 1, rows.shape[-1])  # (B * N, 1, W)
        return self.model.vision_model.head(alone).reshape(*rows.shape[:2], -1)

    def encode_texts(self, texts: Sequence[str], *, normalize: bool = True) -> torch.Tensor:
        """T texts -> (T, D), of unit length unless `normalize` is off. All go through the tower in one batch."""
        return self.encode_tokens(self.tokenize(texts), normalize=normalize)

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """T texts -> (T, L) int64, start and end included, filled with zeros behind the end.

        Texts are cleaned first (see `text.clean`); what exceeds `context_length` is cut, keeping the end token.
        """
        if isinstance(texts, str):
            raise BackboneError("Texts must be a list of strings; put the one string into a list.")
        if self.tokenizer is None:
            raise BackboneError(f"{self.source} has no tokenizer, so it encodes token ids only (encode_tokens).")
        specials = self.tokenizer.all_special_tokens
        cleaned = [clean(text, specials) for text in texts]
        if not cleaned:
            return torch.zeros(0, 0, dtype=torch.int64)
        rows = self.tokenizer(cleaned, truncation=True, max_length=self.context_length)["input_ids"]
        ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
        return nn.utils.rnn.pad_sequence(ids, batch_first=True)  # (T, L)

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
        if ids.ndim != 2 or ids.dtype != torch.int64:
            raise BackboneError(f"Token ids must be (T, L) int64, but are {tuple(ids.shape)} {ids.dtype}.")
        if ids.shape[0] == 0:
            none = torch.zeros(0, self.dim, device=self.device)
            return TextTokens(none, none[:, None], none[:, :1].bool()) if tokens else none
        ids = ids.to(self.device)
        lengths = self._lengths(ids)  # (T,)
        output = self.model.get_text_features(**self._text_inputs(ids, lengths))
        pooled = _unit(output.pooler_output, normalize)
        if not tokens:
            return pooled
        rows = output.last_hidden_state[:, : int(lengths.max())]  # (T, L', W), already normed
        project = self.model.text_model.head if self._family.padding == "fixed" else self.model.text_projection
        mask = torch.arange(rows.shape[1], device=self.device) < lengths[:, None]
        return TextTokens(pooled, _unit(project(rows), normalize), mask)

    def _text_inputs(self, ids: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the text tower takes: cut or filled as the family was trained."""
        longest, most = int(lengths.max()), self.context_length
        if longest > most:
            raise BackboneError(f"A text of {longest} tokens exceeds the context length, which is {most}.")
        ids = ids[:, :longest]
        if self._family.padding == "causal":
            return {"input_ids": ids}
        inside = torch.arange(longest, device=ids.device) < lengths[:, None]  # (T, longest)
        ids = torch.where(inside, ids, self._pad_id)
        if self._family.padding == "masked":
            return {"input_ids": ids, "attention_mask": inside.long()}
        return {"input_ids": nn.functional.pad(ids, (0, most - longest), value=self._pad_id)}

    def _lengths(self, ids: torch.Tensor) -> torch.Tensor:
        """(T, L) -> (T,) tokens of each text before its padding, be that zeros or the family's own padding token."""
        if self._family.padding == "causal":
            return self.end_positions(ids) + 1
        used = (ids != 0) & (ids != self._pad_id)
        return torch.where(used, torch.arange(1, ids.shape[1] + 1, device=ids.device), 1).amax(1)

    @property
    def _pad_id(self) -> int:
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return self.model.config.text_config.pad_token_id if pad is None else pad

    def end_positions(self, ids: torch.Tensor) -> torch.Tensor:
        """(T, L) -> (T,) column of the first end token, where a causal text tower is pooled."""
        end = self.model.config.text_config.eos_token_id
        if self.family == "clip" and end == 2:  # configurations older than the tokenizer fix: the largest id is meant
            return ids.argmax(1)
        found = ids == end  # (T, L)
        if not found.any(1).all():
            row = int((~found.any(1)).nonzero()[0])
            raise BackboneError(f"Row {row} of the token ids has no end token; each text must end with it.")
        return found.int().argmax(1)

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (..., L) -> their vectors (..., L, W) before positions are added, to start prompts from words."""
        return submodule(self.model, self.tower("text").tokens)(ids.to(self.device))

    def prompt_encoder(self, ids: torch.Tensor, *, memory: int = 2 << 30) -> PromptEncoder:
        """For prompts (C, L) that are encoded again and again with other tokens inserted; see `PromptEncoder`.

        memory  bytes that a call may keep for its backward pass; what exceeds them is computed twice instead
        """
        if ids.ndim != 2 or ids.dtype != torch.int64 or len(ids) == 0:
            raise BackboneError(f"Prompts must be (C, L) int64 with C >= 1, but are {tuple(ids.shape)} {ids.dtype}.")
        return PromptEncoder(self, ids, memory)

    def project_texts(self, rows: torch.Tensor) -> torch.Tensor:
        """Pooled rows (..., W) as the last block of a causal text tower leaves them -> features (..., D)."""
        tower = self.tower("text")
        return submodule(self.model, tower.projection)(submodule(self.model, tower.norm)(rows))

    # -- towers -----------------------------------------------------------------------------------------------------

    def tower(self, tower: TowerName) -> Tower:
        if tower not in ("text", "vision"):
            raise unknown_name("tower", tower, ("text", "vision"))
        return self._family.text if tower == "text" else self._family.vision

    def blocks(self, tower: TowerName) -> nn.ModuleList:
        """The transformer blocks of a tower, first to last."""
        return submodule(self.model, self.tower(tower).blocks)  # type: ignore[return-value]

    def width(self, tower: TowerName) -> int:
        """Length of a hidden row."""
        self.tower(tower)
        config = self.model.config
        return (config.text_config if tower == "text" else config.vision_config).hidden_size

    def target_modules(
        self,
        tower: TowerName | Literal["both"] = "both",
        kinds: Sequence[str] = ("q", "k", "v"),
        layers: Sequence[int] | None = None,
    ) -> list[str]:
        """Full names, inside `model`, of the linear layers of the blocks: what `peft` wants as `target_modules`.

        kinds   of q, k, v (attention inputs), o (attention output), fc1, fc2
        layers  numbers of blocks, negative from the end; all without
        """
        for kind in kinds:
            if kind not in KINDS:
                raise unknown_name("kind of linear layer", kind, KINDS)
        towers: tuple[TowerName, ...] = ("text", "vision") if tower == "both" else (tower,)
        names = []
        for one in towers:
            parts = self.tower(one)
            for layer in self.layer_numbers(one, layers):
                names += [f"{parts.blocks}.{layer}.{getattr(parts, kind)}" for kind in kinds]
        if not names:
            raise BackboneError("These kinds and layers name no linear layer at all.")
        return names

    def layer_numbers(self, tower: TowerName, layers: Sequence[int] | None) -> list[int]:
        """Numbers of blocks, negative ones counted from the end; all blocks for None."""
        depth = len(self.blocks(tower))
        if layers is None:
            return list(range(depth))
        for layer in layers:
            if not -depth <= layer < depth:
                raise BackboneError(f"Layer {layer} is outside the {depth} blocks of the {tower} tower.")
        return [layer % depth for layer in layers]

    # -- surgery ----------------------------------------------------------------------------------------------------

    @contextmanager
    def inserted(self, *, text: Sequence[Insertion] = (), vision: Sequence[Insertion] = ()) -> Iterator[None]:
        """While it lasts, every encoding has these tokens put in (see `Insertion`); afterwards nothing remains."""
        with ExitStack() as stack:
            if text:
                stack.enter_context(inserted_tokens(self, "text", text))
            if vision:
                stack.enter_context(inserted_tokens(self, "vision", vision))
            yield

    @contextmanager
    def after_blocks(
        self, tower: TowerName, functions: Mapping[int, Callable[[torch.Tensor], torch.Tensor | None]]
    ) -> Iterator[None]:
        """While it lasts, the rows (B, L, W) that block j leaves go through `functions[j]`, to be read or changed.

        A function gives other rows of the same shape, or None to leave them as they are; gradients flow through it.
        Negative numbers count from the last block. Rows put in by `inserted` are among them.

            seen = []
            with backbone.after_blocks("vision", {3: seen.append}):   # read the rows behind the fourth block
                backbone.encode_images(pixels)
        """
        with rows_after_blocks(self, tower, functions):
            yield

    @contextmanager
    def attention(
        self,
        mode: str = "qk",
        *,
        layers: Sequence[int] | None = (-1,),
        tower: TowerName = "vision",
        bias: torch.Tensor | None = None,
    ) -> Iterator[dict[int, torch.Tensor]]:
        """While it lasts, chosen blocks attend in another way; yields their weights of the latest pass.

        mode    which projections are compared: "qk" (as trained), "qq", "kk", "vv"; "qq+kk" sums two attention
                maps; "identity" lets every row see itself only
        layers  blocks concerned, negative from the end; None for all
        bias    added to the scores before the softmax, broadcast to (B, heads, N, N); -inf forbids
        yields  {block number: (B, heads, N, N)}; with the default arguments this just reads attention maps

        A causal tower stays causal in every mode.
        """
        with changed_attention(self, tower, self.layer_numbers(tower, layers), mode, bias) as maps:
            yield maps

    # -- identity, copies, files ------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of weights, activation, preprocessing and tokenizer, however they are stored.

        Weights count as float32, which is how they are loaded. Recomputed when one has changed.
        """
        return self._fingerprints()[0]

    @property
    def image_fingerprint(self) -> str:
        """The same of what encodes pictures alone: embeddings of pictures are good for all backbones that share it."""
        return self._fingerprints()[1]

    def _fingerprints(self) -> tuple[str, str]:
        state = self.model.state_dict()
        # versions miss what is written through `.data`, as peft does when it merges; sums show it
        stamp = [(name, tensor.data_ptr(), tensor._version, float(tensor.sum())) for name, tensor in state.items()]
        if self._known is None or self._known[0] != stamp:
            whole = hashlib.blake2b(self._setting_digest(), digest_size=16)
            image = hashlib.blake2b(self._image_setting_digest(), digest_size=16)
            with ThreadPoolExecutor() as pool:  # hashing large buffers releases the interpreter lock
                names = sorted(state)
                for name, part in zip(names, pool.map(_weight_digest, names, map(state.get, names)), strict=True):
                    whole.update(part)
                    if name.startswith(self._image_weights):
                        image.update(part)
            self._known = (stamp, (whole.hexdigest(), image.hexdigest()))
        return self._known[1]

    def _image_setting_digest(self) -> bytes:
        """Of `_setting_digest` what concerns pictures."""
        vision = self.model.config.vision_config
        facts = [repr(self.preprocess), vision.hidden_act, vision.num_attention_heads, vision.layer_norm_eps]
        return json.dumps(facts).encode()

    def _setting_digest(self) -> bytes:
        """What the weights do not tell: how pictures and texts become inputs, and how the towers compute.

        The tokenizer counts by what it does, since its files change with library versions.
        """
        config, tokenizer = self.model.config, []
        computed = [
            [part.hidden_act, part.num_attention_heads, part.layer_norm_eps]
            for part in (config.vision_config, config.text_config)
        ]
        if self.tokenizer is not None:
            sentences = self.tokenizer(list(_PROBES), truncation=True, max_length=self.context_length)["input_ids"]
            tokenizer = [sorted(self.tokenizer.get_vocab().items()), sentences]
        return json.dumps([repr(self.preprocess), computed, tokenizer]).encode()

    def to(self, device: str | torch.device) -> Backbone:
        """Move the weights; returns itself."""
        self.model.to(device)
        return self

    def copy(self) -> Backbone:
        """An independent backbone with its own weights."""
        parts = Pretrained(self.family, copy.deepcopy(self.model), self.processor, self.tokenizer)
        return Backbone(self.source, parts, self.device)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a plain transformers folder (safetensors), complete or not at all; `load_backbone` reads it back.

        An older backbone there is replaced; a folder that holds anything else is refused.
        """
        target = Path(folder)
        aside = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
        aside.mkdir(parents=True)
        try:
            with quiet():
                for part in (self.model, self.processor, self.tokenizer):
                    if part is not None:
                        part.save_pretrained(aside)
            _replace_folder(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _weight_digest(name: str, tensor: torch.Tensor) -> bytes:
    digest = hashlib.blake2b(f"{name} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.digest()


def _unit(features: torch.Tensor, normalize: bool) -> torch.Tensor:
    return nn.functional.normalize(features, dim=-1) if normalize else features


def _patchify(pixels: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    """(B, 3, H, W) -> flattened patches (B, N, size * size * 3), their grid and a mask that hides none of them."""
    batch, height, width = pixels.shape[0], pixels.shape[2] // size, pixels.shape[3] // size
    cut = pixels[:, :, : height * size, : width * size].unflatten(3, (width, size)).unflatten(2, (height, size))
    patches = cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, height * width, -1)  # (B, h, w, size, size, 3) flattened
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(batch, height * width, dtype=torch.int64, device=pixels.device),
        "spatial_shapes": torch.tensor([[height, width]] * batch, device=pixels.device),
    }


def _replace_folder(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; an older version there is moved away first, then deleted."""
    if not target.exists():
        os.replace(new, target)
        return
    ours = {path.name for path in new.iterdir()}
    others = [target] if target.is_file() else [path for path in target.iterdir() if path.name not in ours]
    if others:
        raise BackboneError(f"{target} is not replaced, since it holds {others[0].name}; give a new or empty folder.")
    old = new.with_name(f"{new.name}-old")
    os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old)
