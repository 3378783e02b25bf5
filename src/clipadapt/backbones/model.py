"""A pretrained model with named towers: what it is, what changes it, and where it is kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from clipadapt.backbones.attention import changed_attention
from clipadapt.backbones.edits import Edit
from clipadapt.backbones.families import quiet
from clipadapt.backbones.identity import WeightDigests
from clipadapt.backbones.surgery import rows_after_blocks
from clipadapt.backbones.tower import Tower
from clipadapt.backbones.weights import Weight, lazies, own_copy, replace_weights, shared_copy, state
from clipadapt.errors import BackboneError, unknown_name


class Model:
    """Named towers in one module, frozen.

    source  where it came from: a hub id, a folder, a file, ...
    model   the module itself, in evaluation mode, no parameter asking for a gradient
    towers  its towers by name
    edits   the lasting changes of its structure
    """

    def __init__(
        self, source: str, model: nn.Module, towers: Sequence[Tower], device: str | torch.device | None = None
    ) -> None:
        self.source = source
        self.towers = {tower.name: tower for tower in towers}
        self.edits: tuple[Edit, ...] = ()
        self._digests = WeightDigests()
        self._known: dict[str, tuple[Any, str]] = {}  # by part: what the fingerprint was made of, and itself
        self.model = model.eval().requires_grad_(False)
        if device is not None:
            self.to(device)

    @property
    def model(self) -> Any:
        return self._model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._model = model
        for tower in self.towers.values():
            tower.model = model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> Self:
        """Move the weights; returns itself."""
        self.model.to(device)
        self._digests = WeightDigests()  # which holds on to the memory of what it knows
        return self

    # -- towers -----------------------------------------------------------------------------------------------------

    def _tower(self, name: str) -> Tower:
        if name not in self.towers:
            raise unknown_name("tower", name, self.towers)
        return self.towers[name]

    def blocks(self, tower: str) -> nn.ModuleList:
        """The transformer blocks of a tower, first to last."""
        return self._tower(tower).blocks

    def width(self, tower: str) -> int:
        """Length of a hidden row."""
        return self._tower(tower).width

    def layer_numbers(self, tower: str, layers: Sequence[int] | None) -> list[int]:
        """Numbers of blocks, negative ones counted from the end; all blocks for None."""
        return self._tower(tower).layer_numbers(layers)

    def layer_norms(self, tower: str) -> list[str]:
        """Names, inside `model`, of the weights and biases of a tower's layer norms."""
        return self._tower(tower).layer_norms()

    def target_modules(
        self, tower: str = "both", kinds: Sequence[str] = ("q", "k", "v"), layers: Sequence[int] | None = None
    ) -> list[str]:
        """Full names, inside `model`, of the linear layers of the blocks: what `peft` wants as `target_modules`.

        tower   its name; "both" for all towers
        kinds   of q, k, v (attention inputs), o (attention output), fc1, fc2
        layers  numbers of blocks, negative from the end; all without
        """
        towers = [self._tower(name) for name in (self.towers or (tower,) if tower == "both" else (tower,))]
        names = [name for one in towers for name in one.target_modules(kinds, layers)]
        if not names:
            raise BackboneError("These kinds and layers name no linear layer at all.")
        return names

    # -- changes that last for a while --------------------------------------------------------------------------------

    @contextmanager
    def after_blocks(self, tower: str, functions: Mapping[int, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
        """While it lasts, the rows (B, L, W) that block j leaves go through `functions[j]`, to be read or changed.

        A function gives other rows of the same shape, or None to leave them as they are; gradients flow through it.
        Negative numbers count from the last block. Rows put in by `inserted` are among them.

            seen = []
            with backbone.after_blocks("vision", {3: seen.append}):   # read the rows behind the fourth block
                backbone.encode_images(pixels)
        """
        with rows_after_blocks(self._tower(tower), functions):
            yield

    @contextmanager
    def attention(
        self,
        mode: str = "qk",
        *,
        layers: Sequence[int] | None = (-1,),
        tower: str = "vision",
        bias: Tensor | None = None,
    ) -> Iterator[dict[int, Tensor]]:
        """While it lasts, chosen blocks attend in another way; yields their weights of the latest pass.

        mode    which projections are compared: "qk" (as trained), "qq", "kk", "vv"; "qq+kk" sums two attention
                maps; "identity" lets every row see itself only
        layers  blocks concerned, negative from the end; None for all
        bias    added to the scores before the softmax, broadcast to (B, heads, N, N); -inf forbids
        yields  {block number: (B, heads, N, N)}; with the default arguments this just reads attention maps

        A causal tower stays causal in every mode.
        """
        one = self._tower(tower)
        with changed_attention(one, one.layer_numbers(layers), mode, bias) as maps:
            yield maps

    # -- identity ---------------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of everything that changes what the model computes, however it is stored.

        Weights count as float32, which is how they are loaded; edits count. Asking again is cheap, and changes of
        weights are noticed as `identity.WeightDigests` says. What lasts for a while only (`inserted`, `attention`,
        `after_blocks`) is not covered, so asking meanwhile is an error.
        """
        return self._fingerprint()

    def _fingerprint(self, part: str = "") -> str:
        """Of the whole model, or of the tower `part` and what belongs to it."""
        self._refuse_while_changed("has no fingerprint")
        digests = self._digests.of(self.model)
        facts = self._facts()
        made_of, known = self._known.get(part, (None, ""))
        if made_of is None or made_of[0] is not digests or made_of[1] != facts:
            digest = hashlib.blake2b(self._settings(part), digest_size=16)
            begins = self._weights_begin(part)
            for name, one in digests.items():
                if name.startswith(begins):
                    digest.update(one)
            for edit in self.edits:
                if not edit.plain and part in ("", edit.tower):
                    digest.update(edit.digest())
            known = digest.hexdigest()
            self._known[part] = (digests, facts), known
        return known

    def _facts(self) -> tuple[Any, ...]:
        """What `_settings` depends on, quickly compared."""
        return ()

    def _settings(self, part: str) -> bytes:
        """What the weights do not tell: how inputs are made, and how the towers compute."""
        raise NotImplementedError

    def _weights_begin(self, part: str) -> str | tuple[str, ...]:
        """How the names of the weights of a part begin."""
        return ""

    def _refuse_while_changed(self, what: str) -> None:
        for tower in self.towers.values():
            if tower.lasting:
                raise BackboneError(
                    f"{self.source} {what} while `{tower.lasting[-1]}` changes its {tower.name} tower: end it first, "
                    "or encode without a cache."
                )

    # -- other weights, other structure -------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """All weights by name, as they are used: those that are made at each use have their present values."""
        return state(self.model)

    def copy(self) -> Self:
        """An independent model with its own weights, all of them plain tensors."""
        self._refuse_while_changed("cannot be copied")
        return self._with(own_copy(self.model))

    def with_weights(self, weights: Mapping[str, Weight]) -> Self:
        """A model in which `weights` replace this one's, by their names in `weights()`; all others share its memory.

        A value is a tensor, which is taken as it is and not copied, or a function of the weight so far, called at each
        use: many low-rank updates of one model cost no more than their factors. It must give the same for the same
        weight, on the weight's device. Weights made at each use are in `state_dict()` but not among `parameters()`;
        `copy()` makes plain tensors of them, to be trained or changed.

        Raises BackboneError for a name or a shape that the model does not have.
        """
        self._refuse_while_changed("cannot be given other weights")
        other = self._with(shared_copy(self.model), self._digests)
        replace_weights(other.model, weights, self.source)
        return other

    def edited(self, *edits: Edit) -> Self:
        """A model whose structure is changed, one edit after the other; what is not changed shares this one's memory.

        Call `copy()` on it before training, so that this model stays as it is.
        """
        self._refuse_while_changed("cannot be edited")
        other = self._with(shared_copy(self.model), self._digests)
        for edit in edits:
            edit.apply(other._tower(edit.tower))
        other.model.eval().requires_grad_(False)
        other.edits = (*self.edits, *edits)
        return other

    def _with(self, model: nn.Module, digests: WeightDigests | None = None) -> Self:
        """The same around a copy of the module."""
        other = copy(self)
        other.towers = {name: tower.on(model) for name, tower in self.towers.items()}
        other._digests, other._known = WeightDigests(digests), {}
        other.model = model.eval().requires_grad_(False)
        return other

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a plain transformers folder (safetensors), complete or not at all.

        An older model there is replaced; a folder that holds anything else is refused, and so is a model with edits
        that such a folder cannot hold.
        """
        for edit in self.edits:
            if not edit.plain:
                raise BackboneError(f"{self.source} cannot be saved, since a plain folder does not hold {edit}.")
        plain = self.copy() if any(lazies(self.model)) else self
        target = Path(folder)
        aside = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
        aside.mkdir(parents=True)
        try:
            with quiet():
                for part in plain._files():
                    if part is not None:
                        part.save_pretrained(aside)
            _replace_folder(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _files(self) -> Sequence[Any]:
        """What is saved by its own `save_pretrained`."""
        return (self.model,)


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
