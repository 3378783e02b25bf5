"""MF-Adapter: parts of a picture, seen by an early block, are compared with those parts that a class's pictures share.

    logits = s x T' + alpha * exp(-beta (1 - x K')) Y + gamma * L
    L_c = mean over units u of class c of exp(-b (1 - max over windows w of <a(w), u>))     a(w) = unit(w + B relu(A w))

Shi et al., "Learning to Adapt Category Consistent Meta-Feature of CLIP for Few-Shot Classification" (arXiv 2407.05647).
Read were the abstract and a published summary; there is no official code. Known from these: local meta-features come
from sliding windows of several sizes on low-level features; the MF-Unit is a local similarity that measures what is
consistent within a category; a trained adapter maps meta-features to MF-Units; local, high-level (cache) and text
logits are added. The rest is ours:

* Windows are means of square stretches of patch rows behind block `layer`, half their side apart, less the mean window
  of the support set, which all early rows have in common, and of unit length. A picture keeps the `keep` that differ
  most from its own mean; the others are mostly background, and would fill the memory.
* A class's units are the windows of its pictures that come back in its other pictures: the highest mean, over these,
  of the best match; each of its first 64 pictures gives an equal share of `units`, at least one.
* Cache keys and adapter are trained together, by cross-entropy of the sum. Keys are those of Tip-Adapter-F, with its
  settings, so that with `gamma` 0 this is Tip-Adapter-F. The adapter's second layer starts from zero. In training a
  picture's own windows are no units for it, unless its class has no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy, normalize, relu

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_classes, encode_images, other_tower
from clipadapt.methods.base import Card, Method, Run, hyper, label_array
from clipadapt.methods.registry import register
from clipadapt.methods.training_free_few_shot.tip_adapter import cache_logits, search
from clipadapt.training.loop import batches, seeded, train
from clipadapt.training.schedules import cosine
from clipadapt.training.search import best_on

_CELLS = 1 << 24  # similarities of windows and units held at once: 64 MB
_MOST = 64  # pictures of a class that units are taken from


def windows(rows: Tensor, grid: tuple[int, int], sizes: list[int]) -> Tensor:
    """Means of the square windows of all `sizes`, in patches, over rows (B, h * w, W): (B, L, W), not normalised.

    They lie half their side apart; sizes that exceed the grid are cut to it.
    """
    maps = rows.transpose(1, 2).unflatten(2, grid)  # (B, W, h, w)
    cut = dict.fromkeys((min(size, grid[0]), min(size, grid[1])) for size in sizes)
    pooled = (avg_pool2d(maps, size, stride=(max(size[0] // 2, 1), max(size[1] // 2, 1))) for size in cut)
    return torch.cat([p.flatten(2) for p in pooled], dim=2).transpose(1, 2)


def distinctive(found: Tensor, keep: int) -> Tensor:
    """Of each picture's windows (B, L, W) those `keep` farthest from their mean, in order: (B, min(keep, L), W)."""
    distance = (found - found.mean(dim=1, keepdim=True)).norm(dim=2)  # (B, L)
    rows = distance.topk(min(keep, found.shape[1]), dim=1).indices.sort(dim=1).values
    return found.gather(1, rows[..., None].expand(-1, -1, found.shape[2]))


def consistent(found: Tensor, share: int) -> tuple[Tensor, Tensor]:
    """Of each picture of one class the `share` windows that its other pictures match best.

    found (n, P, W) unit -> units (n * share, W), and the picture (n * share,) that each is from. Of a single picture
    the first windows are taken.
    """
    n, p, _ = found.shape
    score = found.new_zeros(n, p)
    for i in range(n):
        matches = torch.einsum("pw,nqw->npq", found[i], found).amax(dim=2)  # (n, P): the best in every picture
        score[i] = (matches.sum(dim=0) - matches[i]) / max(n - 1, 1) if n > 1 else 0.0
    chosen = score.sort(dim=1, descending=True, stable=True).indices[:, :share]  # (n, share)
    units = found.gather(1, chosen[..., None].expand(-1, -1, found.shape[2]))
    return units.flatten(0, 1), torch.arange(n).repeat_interleave(chosen.shape[1])


def adapt(found: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Windows (..., W) through the residual bottleneck down (H, W), up (W, H), of unit length."""
    return normalize(found + relu(found @ down.T) @ up.T, dim=-1)


def best_matches(found: Tensor, units: Tensor) -> Tensor:
    """For windows (B, P, W) and units (U, W) the best product of each picture with each unit (B, U), in chunks.

    The backward pass keeps which window it was, not the products.
    """
    chunk = max(_CELLS // max(found.shape[1] * len(units), 1), 1)
    return torch.cat([(part @ units.T).max(dim=1).values for part in found.split(chunk)])


def local_logits(matches: Tensor, values: Tensor, beta: float, hidden: Tensor | None = None) -> Tensor:
    """Matches (B, U) averaged by class, as values (U, C) one-hot say: (B, C). Units `hidden`, (B, U) bool, are left
    out, except for classes that have no others.
    """
    affinity = (beta * matches - beta).exp()
    total, count = affinity @ values, values.sum(dim=0).expand(len(matches), -1)  # (B, C)
    if hidden is not None:
        gone = hidden.to(values.dtype)
        rest = count - gone @ values
        left = (affinity * (1 - gone)) @ values
        total, count = torch.where(rest > 0, left, total), torch.where(rest > 0, rest, count)
    return total / count.clamp(min=1)


@register
@dataclass(kw_only=True)
class MFAdapter(Method):
    """Tip-Adapter-F and a comparison of local features; alpha, beta, gamma are searched on `val` where it is given."""

    alpha: float = hyper(1.17, "weight of the cache (Tip-Adapter-F)", low=0)
    beta: float = hyper(1.0, "sharpness of the cache's affinities (Tip-Adapter-F)", low=0)
    gamma: float = hyper(50.0, "weight of the local logits; 0 is Tip-Adapter-F (ours)", low=0)
    local_beta: float = hyper(5.5, "sharpness of the units' affinities (ours)", low=0)
    layer: int | None = hyper(
        None, "block whose rows are looked at, negative from the end; by default the middle (ours)"
    )
    sizes: list[int] = hyper([2, 4], "sides of the windows in patches (ours)")
    keep: int = hyper(32, "windows kept of a picture (ours)", low=1)
    units: int = hyper(32, "units of a class (ours)", low=1)
    lr: float = hyper(1e-3, "AdamW learning rate (Tip-Adapter-F)", low=0)
    epochs: int = hyper(20, "passes over the support set (Tip-Adapter-F)", low=1)
    batch_size: int = hyper(256, "pictures a step (Tip-Adapter-F)", low=1)
    seed: int = hyper(1, "initial weights and order of the pictures")

    card = Card(
        key="mf-adapter",
        title="Learning to Adapt Category Consistent Meta-Feature of CLIP for Few-Shot Classification",
        arxiv="2407.05647",
        family="feature-adapter",
        task="few-shot classification",
        trains="cache keys and a bottleneck on local features",
        signal="labels",
        requires=frozenset({"patches"}),
    )
    search_space = {"alpha": (1.17, 5.0, 20.0), "gamma": (20.0, 100.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sizes or any(not isinstance(size, int) or size < 1 for size in self.sizes):
            raise ClipadaptError(f"mf-adapter: sizes = {self.sizes!r} must be a list of window sides, each at least 1.")

    def _fit_towers(self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run) -> None:
        labels = torch.as_tensor(label_array(support))
        self.weight_ = backbone.logit_scale * encode_classes(backbone, support.class_names, self.templates)  # (C, D)
        x, found = self._encode(backbone, support)  # (N, D), (N, P, W)
        self.centre_ = found.mean(dim=(0, 1))  # (W,)
        found = normalize(found - self.centre_, dim=2)
        sources = self._choose_units(found, labels)
        zero_shot, unit_values = x @ self.weight_.T, self._one_hot(self.unit_labels_)
        self.values_ = self._one_hot(labels)  # (N, C)
        width = found.shape[2]
        with seeded(self.seed):
            down = torch.nn.Linear(width, max(width // 4, 1), bias=False).weight
        up = torch.zeros(width, len(down), requires_grad=True)
        keys = x.clone().requires_grad_()
        steps = batches(len(x), self.batch_size, epochs=self.epochs, seed=self.seed)

        def loss_of(rows: Tensor) -> Tensor:
            cache = cache_logits(x[rows], keys, self.values_, self.beta)
            logits = zero_shot[rows] + self.alpha * cache
            if self.gamma:
                matches = best_matches(adapt(found[rows], down, up), self.units_)
                hidden = rows[:, None] == sources
                logits = logits + self.gamma * local_logits(matches, unit_values, self.local_beta, hidden)
            return cross_entropy(logits, labels[rows])

        train(
            loss_of,
            torch.optim.AdamW([keys, down, up], lr=self.lr, eps=1e-4, weight_decay=0.01),
            steps,
            schedule=lambda step: cosine(step, len(steps)),
            run=run,
        )
        self.keys_, self.down_, self.up_ = keys.detach(), down.detach(), up.detach()
        self.alpha_, self.beta_, self.gamma_ = self.alpha, self.beta, self.gamma
        if val is not None:
            self._search(backbone, val)

    def _choose_units(self, found: Tensor, labels: Tensor) -> Tensor:
        """Sets `units_` (U, W) and `unit_labels_` (U,); returns the picture (U,) that each unit is from."""
        parts = []
        for label in labels.unique().tolist():
            rows = (labels == label).nonzero()[:_MOST, 0]
            units, places = consistent(found[rows], max(self.units // len(rows), 1))
            parts.append((units, torch.full_like(places, label), rows[places]))
        self.units_, self.unit_labels_, sources = (torch.cat(part) for part in zip(*parts, strict=True))
        return sources

    def _search(self, backbone: Backbone, val: Dataset) -> None:
        """alpha and beta as Tip-Adapter-F finds them, then gamma beside them."""
        y = torch.as_tensor(label_array(val))
        encoded = self._encoded(backbone, val, self._local, len(self.weight_))
        x, local = encoded[:, : backbone.dim], encoded[:, backbone.dim :]  # (V, D), (V, C)
        zero_shot = x @ self.weight_.T
        self.beta_, self.alpha_ = search(zero_shot, x @ self.keys_.T, self.values_, y)
        high = zero_shot + self.alpha_ * cache_logits(x, self.keys_, self.values_, self.beta_)
        tried = (self.gamma * factor for factor in (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0))
        self.gamma_ = best_on(y, ((gamma, high + gamma * local) for gamma in tried))[0]

    def _one_hot(self, labels: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(labels, len(self.weight_)).to(self.weight_.dtype)

    # -- pictures ---------------------------------------------------------------------------------------------------

    def _encode(self, backbone: Backbone, images: Any) -> tuple[Tensor, Tensor]:
        """Unit features (N, D) and kept windows (N, P, W) of pictures, each looked at once."""
        grid = (backbone.image_size[0] // backbone.patch_size, backbone.image_size[1] // backbone.patch_size)
        count = min(self.keep, windows(torch.zeros(1, grid[0] * grid[1], 1), grid, self.sizes).shape[1])
        width = backbone.width("vision")
        encoded = self._encoded(backbone, images, lambda found: found.flatten(1), count * width)
        return encoded[:, : backbone.dim], encoded[:, backbone.dim :].unflatten(1, (count, width))

    def _encoded(self, backbone: Backbone, images: Any, of_windows: Any, size: int) -> Tensor:
        """Unit features and `of_windows` of the kept windows (B, P, W) -> (B, size), side by side (N, D + size)."""

        def encode(pixels: Tensor) -> Tensor:
            features, found = self._look(backbone, pixels)
            return torch.cat([features, of_windows(found)], dim=1)

        return encode_images(other_tower(backbone, encode, backbone.dim + size), images, cache=False).features

    def _look(self, backbone: Backbone, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) -> unit features (B, D) and kept windows (B, P, W), from one pass, on the CPU."""
        middle = (len(backbone.blocks("vision")) - 1) // 2
        seen: list[Tensor] = []
        with backbone.after_blocks("vision", {middle if self.layer is None else self.layer: seen.append}):
            features = backbone.encode_images(pixels)
        rows = seen[0][:, 1:] if "class-token" in backbone.capabilities else seen[0]  # (B, h * w, W)
        grid = (pixels.shape[2] // backbone.patch_size, pixels.shape[3] // backbone.patch_size)
        return features.cpu(), distinctive(windows(rows, grid, self.sizes), self.keep).cpu()

    def _local(self, found: Tensor) -> Tensor:
        """Kept windows (B, P, W) -> local logits (B, C)."""
        found = adapt(normalize(found - self.centre_, dim=2), self.down_, self.up_)
        return local_logits(best_matches(found, self.units_), self._one_hot(self.unit_labels_), self.local_beta)

    def _scores(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, C)."""
        x, found = self._look(self._fitted("backbone_"), pixels)
        cache = cache_logits(x, self.keys_, self.values_, self.beta_)
        return x @ self.weight_.T + self.alpha_ * cache + self.gamma_ * self._local(found)

    def image_logits(self, images: Any, *, on_error: str = "raise", progress: bool = False) -> tuple[Tensor, list[int]]:
        tower = other_tower(self._fitted("backbone_"), self._scores, len(self.class_names_))  # (B, C)
        encoded = encode_images(tower, images, cache=False, on_error=on_error, progress=progress)
        return encoded.features, encoded.kept

    def _logits(self, images: Tensor) -> Tensor:
        raise ClipadaptError(f"{self.card.key} also looks at patches: give pictures to image_logits, not features.")

    @property
    def trained_parameters(self) -> int:
        return self.keys_.numel() + self.down_.numel() + self.up_.numel()
