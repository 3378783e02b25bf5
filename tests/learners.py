"""Prompt learners with given values, for tests that compare them with other computations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clipadapt.backbones import Backbone
from clipadapt.methods import create


def bound(
    key: str, backbone: Backbone, class_names: Sequence[str], start: Mapping[str, Tensor] | None = None, **settings: Any
) -> Any:
    """The learner of the method called `key`, whose parameters named in `start` have these values."""
    learner = create(key, **settings).bind(backbone, class_names)
    return filled(learner, start or {})


def filled(learner: Any, values: Mapping[str, Tensor]) -> Any:
    """A learner after its parameters of these names were given these values."""
    parameters = dict(learner.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            assert parameters[name].shape == value.shape
            parameters[name].copy_(value)
    return learner


def coop(backbone: Backbone, class_names: Sequence[str], context: Tensor) -> Any:
    """CoOp's learner with this context (M, W)."""
    return bound("coop", backbone, class_names, {"context": context.detach()}, n_ctx=len(context))
