"""`Update`: what of a model changes. A value next to the model, not a wrapper around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from clipadapt.backbones.weights import weight_of
from clipadapt.errors import ClipadaptError

Change = Callable[[Tensor], Tensor]  # a weight as the model has it -> the changed weight, without gradients


class Update(nn.Module):
    """What of a model changes; its own parameters are all that is trained.

    mergeable  whether the changed model is the same model with other weights
    cheap      whether changed weights need not be kept, since making them at each use costs next to nothing

        update = LowRank(backbone.model, backbone.target_modules(), rank=2, scaling=1.0)
        with update.attached(backbone.model):
            backbone.encode_images(pixels)                       # gradients reach update.parameters()
        update.merged(backbone.model)                            # dense weights W' by name
        again = LowRank.restore(update.tensors(), backbone.model, sites, rank=2, scaling=1.0)

    Updates of a kind differ in their constructor only. It takes the model, to look at and not to change, and puts the
    update on the model's device; `restore` of each kind makes an update from saved tensors and draws nothing at random.
    """

    mergeable: ClassVar[bool] = False
    cheap: ClassVar[bool] = False  # whether changes cost so little that they can be made at each use of a weight

    def __init__(self) -> None:
        super().__init__()
        self._attached_to: set[int] = set()

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """While it lasts, `model` computes with the update, whatever is called; afterwards nothing remains.

        It may last for one call or for a whole training run: values that change meanwhile are seen.

        Gradients reach this update's parameters, and those of updates attached around it, but not the model's own.
        Of several nested updates, those of weights work first, then those at sites; within each group, an inner one
        works on what the outer one leaves. The model's `state_dict`, its copies and its fingerprint do not show the
        update: features encoded meanwhile must not be kept under that fingerprint.

        Raises:
            ClipadaptError: The model lacks a named part, or this update is attached to it already.
        """
        if id(model) in self._attached_to:
            raise ClipadaptError(f"This {type(self).__name__} is attached to the model already; attach it once.")
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._attached_to.add(id(model))
        try:
            for parameter in learning:
                parameter.requires_grad_(False)
            with self._computing(model):
                yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)
            self._attached_to.remove(id(model))

    def _computing(self, model: nn.Module) -> AbstractContextManager[None]:
        """The context of `attached`, without its checks and without freezing the model."""
        raise NotImplementedError

    def changes(self, factor: float = 1.0) -> dict[str, Change]:
        """For each weight that changes, by its name in the model, what makes the changed weight of the original.

        factor  0 leaves the weights as they are, 1 is the update; values between are on the straight line

        A change has no gradient and may return the update's own tensor: do not write into it.

        Raises:
            ClipadaptError: The update is not mergeable.
        """
        raise ClipadaptError(f"{type(self).__name__} cannot be merged into the model's weights; attach it instead.")

    @torch.no_grad()
    def merged(self, model: nn.Module, factor: float = 1.0) -> dict[str, Tensor]:
        """The changed weights by their names in `model`; `factor` and errors as in `changes`."""
        return {name: change(weight_of(model, name).detach()) for name, change in self.changes(factor).items()}

    # -- counting and keeping -----------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many numbers are trained; what is shared counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def by_name(self) -> dict[str, nn.Parameter]:
        """The trained parameters themselves by the names of `tensors`, each once."""
        return {self._saved_name(key): parameter for key, parameter in self.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU of all that must be saved, each shared tensor once, by name."""
        return {name: tensor.detach().cpu().clone() for name, (_, tensor) in self._kept().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> Self:
        """Take the values that `tensors` of an update of the same form gave; it is then frozen and in evaluation mode.

        Raises:
            ClipadaptError: A tensor is missing, has another shape, or is not one of this update's.
        """
        kept = self._kept()
        check_tensors(type(self).__name__, tensors, {name: old.shape for name, (_, old) in kept.items()})
        for name, (key, old) in kept.items():
            path, _, leaf = key.rpartition(".")
            device = torch.device("cpu") if old.is_meta else old.device
            new = tensors[name].detach().to(device, old.dtype, copy=True)
            setattr(self.get_submodule(path), leaf, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
        return self.frozen()

    def frozen(self) -> Self:
        """Itself, in evaluation mode and without gradients."""
        return self.requires_grad_(False).eval()

    def _kept(self) -> dict[str, tuple[str, Tensor]]:
        """By the name that it is saved under, torch's own name of each tensor and the tensor."""
        return {
            self._saved_name(key): (key, tensor) for key, tensor in [*self.named_parameters(), *self.named_buffers()]
        }

    def _saved_name(self, key: str) -> str:
        """The name under which the tensor with torch's own name `key` is saved."""
        return key


def check_tensors(kind: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """ClipadaptError unless `tensors` are exactly those of `shapes`, for an update of that `kind`."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise ClipadaptError(f"The tensor {name!r} of this {kind} is missing.")
        if tensors[name].shape != shape:
            found = tuple(tensors[name].shape)
            raise ClipadaptError(f"The tensor {name!r} of this {kind} must have shape {tuple(shape)}, not {found}.")
    for name in tensors:
        if name not in shapes:
            raise ClipadaptError(f"This {kind} has no tensor called {name!r}; it was saved with other settings.")
