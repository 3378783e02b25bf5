"""Both towers of a backbone as one module that is trained, and the gradient of a batch, at once or in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from clipadapt.backbones import Backbone
from clipadapt.errors import ClipadaptError
from clipadapt.losses.contrastive import contrast
from clipadapt.training.objective import Objective, Terms, detached, total
from clipadapt.training.pairs import Batch

IMAGE_PARTS = ("vision_model", "visual_projection")  # of a model; all others are the text tower's
FACTORS = ("scale", "bias")  # outputs that belong to a whole batch


class Towers(nn.Module):
    """Both towers of a backbone, ready to be trained, in one forward pass as DistributedDataParallel wants it.

    The parameters are the model's under the same names, except that the logit scale (and bias) is a vector of one:
    sharded training (FSDP) refuses scalar parameters.
    """

    def __init__(
        self, backbone: Backbone, precision: str = "fp32", train: str = "both", frozen: Sequence[str] = ()
    ) -> None:
        super().__init__()
        parts = dict(backbone.model.named_children())
        for name in sorted(parts, key=lambda name: name not in IMAGE_PARTS):
            self.add_module(name, parts[name].requires_grad_(train == "both" or name not in IMAGE_PARTS))
        for name, parameter in self.named_parameters():
            if name.startswith(tuple(frozen)):
                parameter.requires_grad_(False)
        self.logit_scale = nn.Parameter(backbone.model.logit_scale.detach().clone().reshape(1))
        bias = getattr(backbone.model, "logit_bias", None)
        self.logit_bias = None if bias is None else nn.Parameter(bias.detach().clone().reshape(1))
        self.backbone, self.precision, self.locked = backbone, precision, train != "both"

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The outputs that an objective takes: a feature for each image and text, what was given, scale and bias."""
        if not batch.images and not self.locked:
            raise ClipadaptError('The source gives no images, so the image tower cannot learn; set towers="text".')
        # Autocast begins here, not around the step: weights cast in a pass without gradients must not be reused.
        with torch.autocast(self.logit_scale.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            out = {name: self.encode_images(pixels, batch.keep) for name, pixels in batch.images.items()}
            out |= {name: self.encode_texts(ids) for name, ids in batch.ids.items()}
            out["scale"] = self.logit_scale.exp()
            if self.logit_bias is not None:
                out["bias"] = self.logit_bias
        return {**batch.given, **out}

    def encode_images(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """Unit-norm features (B, D) of pixels (B, 3, S, S), seen through the patches `keep` (B, K), or all of them."""
        if keep is None:
            return F.normalize(self.backbone.encode_images(pixels, normalize=False).float(), dim=-1)
        tower, project = self.backbone.model.vision_model, self.backbone.model.visual_projection
        hidden = tower.embeddings(pixels)  # (B, 1 + N, W)
        kept = hidden[:, 1:].gather(1, keep[..., None].expand(-1, -1, hidden.shape[-1]))  # (B, K, W)
        hidden = tower.pre_layrnorm(torch.cat([hidden[:, :1], kept], dim=1))  # (B, 1 + K, W)
        hidden = tower.encoder(inputs_embeds=hidden).last_hidden_state
        pooled = tower.post_layernorm(hidden[:, 0])  # (B, W)
        return F.normalize(project(pooled).float(), dim=-1)

    def encode_texts(self, ids: Tensor) -> Tensor:
        """Unit-norm features (B, D) or (B, K, D) of token ids (B, L) or (B, K, L)."""
        features = self.backbone.encode_tokens(ids.reshape(-1, ids.shape[-1]), normalize=False)
        return F.normalize(features.float(), dim=-1).reshape(*ids.shape[:-1], -1)


def backward(towers: nn.Module, batch: Batch, chunk: int | None = None, objective: Objective = contrast) -> Terms:
    """Leave the gradient of the objective of `batch` in the parameters; returns its value, detached.

    towers: Towers, also shared out (FSDP2), or DistributedDataParallel around it. chunk: items per forward pass
    (gradient caching). With chunks, all features are computed first, without a graph; the loss gives their gradients;
    then each chunk is encoded again, and its share of those gradients goes back through the towers. The sum over chunks
    is the whole batch's gradient.
    """
    if chunk is None:
        terms = objective(towers(batch))
        total(terms).backward()
        return detached(terms)

    chunks = batch.split(chunk)
    with torch.no_grad():
        parts = [towers(part) for part in chunks]
    features = {name: torch.cat([part[name] for part in parts]) for name in (*batch.images, *batch.ids)}
    features |= {name: parts[0][name] for name in FACTORS if name in parts[0]}
    for feature in features.values():
        feature.requires_grad_()
    terms = objective({**batch.given, **features})
    found = torch.autograd.grad(total(terms), [*features.values()], allow_unused=True)
    gradients = {name: gradient for name, gradient in zip(features, found, strict=True) if gradient is not None}
    for index, part in enumerate(chunks):
        rows = slice(index * chunk, (index + 1) * chunk)
        last = index == len(chunks) - 1
        if isinstance(towers, FSDPModule):
            towers.set_requires_gradient_sync(last)
        shares = [g / len(chunks) if name in FACTORS else g[rows] for name, g in gradients.items()]
        with nullcontext() if last or not isinstance(towers, DistributedDataParallel) else towers.no_sync():
            out = towers(part)
            torch.autograd.backward([out[name] for name in gradients], shares)
    return detached(terms)
