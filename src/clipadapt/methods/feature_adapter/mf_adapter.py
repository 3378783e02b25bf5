"""MF-Adapter: parts of an image, seen by an early block, are compared with those parts that a class's images share.

    logits = s x T' + alpha * exp(-beta (1 - x K')) Y + gamma * L
    L_c = mean over units u of class c of exp(-b (1 - max over windows w of <a(w), u>))     a(w) = unit(w + B relu(A w))

Shi et al., "Learning to Adapt Category Consistent Meta-Feature of CLIP for Few-Shot Classification" (arXiv 2407.05647).
Read were the abstract and a published summary; there is no official code. Known from these: local meta-features come
from sliding windows of several sizes on low-level features; the MF-Unit is a local similarity that measures what is
consistent within a category; a trained adapter maps meta-features to MF-Units; local, high-level (cache) and text
logits are added. The rest is ours:

* Windows are means of square stretches of patch tokens after block `layer`, half their side apart, less the mean window
  of the support set, which all early tokens have in common, and of unit length. An image keeps the `keep` that differ
  most from its own mean; the others are mostly background, and would fill the memory.
* A class's units are the windows of its images that come back in its other images: the highest mean, over these,
  of the best match; each of its first 64 images gives an equal share of `units`, at least one.
* Cache keys and adapter are trained together, by cross-entropy of the sum. Keys are those of Tip-Adapter-F, with its
  settings, so that with `gamma` 0 this is Tip-Adapter-F. The adapter's second layer starts from zero. In training an
  image's own windows are not units for it, unless its class has no others.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy, normalize, one_hot, relu

from clipadapt.features import Adapted, encode_images
from clipadapt.methods import Classifier, ImageMethod, Run, TrainingData, hyper, method
from clipadapt.nn.cache import cache_logits
from clipadapt.training.cache_search import best_cache
from clipadapt.training.loop import batches, seeded, train
from clipadapt.training.schedules import cosine
from clipadapt.training.search import best_on


def window_sides(value: Any) -> str | None:
    """What `sizes` must be, where `value` is not that."""
    right = isinstance(value, list | tuple) and value and all(isinstance(size, int) and size >= 1 for size in value)
    return None if right else "must be a list of window sides, each at least 1"


def windows(rows: Tensor, grid: tuple[int, int], sizes: list[int]) -> Tensor:
    """Means of the square windows of all `sizes`, in patches, over rows (B, h * w, W): (B, L, W), not normalised.

    They are half their side apart; sizes that exceed the grid are cut to it.
    """
    maps = rows.transpose(1, 2).unflatten(2, grid)  # (B, W, h, w)
    cut = dict.fromkeys((min(size, grid[0]), min(size, grid[1])) for size in sizes)
    pooled = (avg_pool2d(maps, size, stride=(max(size[0] // 2, 1), max(size[1] // 2, 1))) for size in cut)
    return torch.cat([p.flatten(2) for p in pooled], dim=2).transpose(1, 2)


def distinctive(found: Tensor, keep: int) -> Tensor:
    """Of each image's windows (B, L, W) those `keep` farthest from their mean, in order: (B, min(keep, L), W)."""
    distance = (found - found.mean(dim=1, keepdim=True)).norm(dim=2)  # (B, L)
    rows = distance.topk(min(keep, found.shape[1]), dim=1).indices.sort(dim=1).values
    return found.gather(1, rows[..., None].expand(-1, -1, found.shape[2]))


def consistent(found: Tensor, share: int) -> tuple[Tensor, Tensor]:
    """Of each image of one class the `share` windows that its other images match best.

    found (n, P, W) unit -> units (n * share, W), and the image (n * share,) that each is from. Of a single image
    the first windows are taken.
    """
    n, p, _ = found.shape
    score = found.new_zeros(n, p)
    for i in range(n):
        matches = torch.einsum("pw,nqw->npq", found[i], found).amax(dim=2)  # (n, P): the best in every image
        score[i] = (matches.sum(dim=0) - matches[i]) / max(n - 1, 1) if n > 1 else 0.0
    chosen = score.sort(dim=1, descending=True, stable=True).indices[:, :share]  # (n, share)
    units = found.gather(1, chosen[..., None].expand(-1, -1, found.shape[2]))
    return units.flatten(0, 1), torch.arange(n).repeat_interleave(chosen.shape[1])


def adapt(found: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Windows (..., W) through the residual bottleneck down (H, W), up (W, H), of unit length."""
    return normalize(found + relu(found @ down.T) @ up.T, dim=-1)


def best_matches(found: Tensor, units: Tensor, cells: int = 1 << 24) -> Tensor:
    """For windows (B, P, W) and units (U, W) the best product of each image with each unit (B, U).

    About `cells` products are held at once (64 MB); the backward pass keeps which window it was, not the products.
    """
    chunk = max(cells // max(found.shape[1] * len(units), 1), 1)
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


def choose_units(found: Tensor, labels: Tensor, count: int, most: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Of unit windows (N, P, W) some `count` a class, from its first `most` images.

    Returns units (U, W), their labels (U,) and the image (U,) that each is from.
    """
    parts = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:most, 0]
        units, places = consistent(found[rows], max(count // len(rows), 1))
        parts.append((units, torch.full_like(places, label), rows[places]))
    units, unit_labels, sources = (torch.cat(part) for part in zip(*parts, strict=True))
    return units, unit_labels, sources


def compared(x: Tensor, found: Tensor, down: Tensor, up: Tensor, units: Tensor, values: Tensor, beta: float) -> Tensor:
    """Features (B, D) with the local logits (B, C) of centred windows (B, P, W): (B, D + C)."""
    matches = best_matches(adapt(normalize(found, dim=2), down, up), units)
    return torch.cat([x, local_logits(matches, values, beta)], dim=1)


def look(backbone: Any, pixels: Tensor, layer: int | None, sizes: list[int], keep: int) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, H, W) -> unit features (B, D) and kept windows (B, P, W), from one pass, on the CPU."""
    middle = (len(backbone.blocks("vision")) - 1) // 2
    seen: list[Tensor] = []
    with backbone.after_blocks("vision", {middle if layer is None else layer: seen.append}):
        features = backbone.encode_images(pixels)
    tokens = seen[0][:, 1:] if "class-token" in backbone.capabilities else seen[0]  # (B, h * w, W)
    grid = pixels.shape[2] // backbone.patch_size, pixels.shape[3] // backbone.patch_size
    return features.cpu(), distinctive(windows(tokens, grid, sizes), keep).cpu()


def kept_windows(size: tuple[int, int], patch: int, sizes: list[int], keep: int) -> int:
    """How many windows P `look` keeps of an image of this size."""
    grid = size[0] // patch, size[1] // patch
    return min(keep, windows(torch.zeros(1, grid[0] * grid[1], 1), grid, sizes).shape[1])


@method(
    "mf-adapter",
    title="Learning to Adapt Category Consistent Meta-Feature of CLIP for Few-Shot Classification",
    arxiv="2407.05647",
    trains="cache keys and a bottleneck on local features",
    signal="labels",
    requires=("patches",),
)
class MFAdapter(ImageMethod, Classifier):
    """Tip-Adapter-F and a comparison of local features; alpha, beta, gamma are searched on `val` where it is given.

    >>> model = create("mf-adapter", epochs=1).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    alpha: float = hyper(1.17, "weight of the cache (Tip-Adapter-F)", low=0)
    beta: float = hyper(1.0, "sharpness of the cache's affinities (Tip-Adapter-F)", low=0)
    gamma: float = hyper(50.0, "weight of the local logits; 0 is Tip-Adapter-F (ours)", low=0)
    local_beta: float = hyper(5.5, "sharpness of the units' affinities (ours)", low=0)
    layer: int | None = hyper(
        None, "block whose tokens are looked at, negative from the end; by default the middle (ours)"
    )
    sizes: list[int] = hyper([2, 4], "sides of the windows in patches (ours)", check=window_sides)
    keep: int = hyper(32, "windows kept of an image (ours)", low=1)
    units: int = hyper(32, "units of a class (ours)", low=1)
    lr: float = hyper(1e-3, "AdamW learning rate (Tip-Adapter-F)", low=0)
    epochs: int = hyper(20, "passes over the support set (Tip-Adapter-F)", low=1)
    batch_size: int = hyper(256, "images a step (Tip-Adapter-F)", low=1)
    seed: int = hyper(1, "initial weights and order of the images")

    search_space = {"alpha": (1.17, 5.0, 20.0), "gamma": (20.0, 100.0)}

    def _fit(self, backbone: Any, data: TrainingData, run: Run) -> None:
        labels = torch.as_tensor(self.labels.array(data.support))
        dim, width, classes = backbone.dim, backbone.width("vision"), len(self.class_names_)
        count = kept_windows(backbone.image_size, backbone.patch_size, self.sizes, self.keep)
        tower = self._tower(lambda x, found: torch.cat([x, found.flatten(1)], dim=1), dim + count * width)
        encoded = encode_images(tower, data.support, cache=False).features
        x, found = encoded[:, :dim], encoded[:, dim:].unflatten(1, (count, width))  # (N, D), (N, P, W)
        self.centre_ = found.mean(dim=(0, 1))  # (W,)
        found = normalize(found - self.centre_, dim=2)
        self.units_, self.unit_labels_, sources = choose_units(found, labels, self.units)
        self.weight_ = self._text_classifier(backbone)  # (C, D)
        self.values_, unit_values = one_hot(labels, classes).float(), one_hot(self.unit_labels_, classes).float()
        zero_shot = x @ self.weight_.T
        with seeded(self.seed):
            down = torch.nn.Linear(width, max(width // 4, 1), bias=False).weight
        up = torch.zeros(width, len(down), requires_grad=True)
        keys = x.clone().requires_grad_()
        steps = batches(len(x), self.batch_size, epochs=self.epochs, seed=self.seed)

        def loss_of(rows: Tensor) -> Tensor:
            logits = zero_shot[rows] + self.alpha * cache_logits(x[rows], keys, self.values_, self.beta)
            if self.gamma:
                matches = best_matches(adapt(found[rows], down, up), self.units_)
                hidden = rows[:, None] == sources
                logits = logits + self.gamma * local_logits(matches, unit_values, self.local_beta, hidden)
            return cross_entropy(logits, labels[rows])

        optimizer = torch.optim.AdamW([keys, down, up], lr=self.lr, eps=1e-4, weight_decay=0.01)
        train(loss_of, optimizer, steps, schedule=lambda step: cosine(step, len(steps)), run=run)
        self.keys_, self.down_, self.up_ = keys.detach(), down.detach(), up.detach()
        self.alpha_, self.beta_, self.gamma_ = self.alpha, self.beta, self.gamma
        if data.val is not None:  # alpha and beta as Tip-Adapter-F finds them, then gamma next to them
            y = torch.as_tensor(self.labels.array(data.val))
            encoded = encode_images(self._tower(self._compared, dim + classes), data.val, cache=False).features
            x, local = encoded[:, :dim], encoded[:, dim:]  # (V, D), (V, C)
            zero_shot = x @ self.weight_.T
            self.beta_, self.alpha_ = best_cache(zero_shot, x @ self.keys_.T, self.values_, y)
            high = zero_shot + self.alpha_ * cache_logits(x, self.keys_, self.values_, self.beta_)
            tried = (self.gamma * factor for factor in (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0))
            self.gamma_ = best_on(y, ((gamma, high + gamma * local) for gamma in tried))[0]

    def _name(self, backbone: Any) -> None:
        """Nothing: all that depends on the class names was learned."""

    def _tower(self, of: Any, dim: int) -> Any:
        """An encoder that gives `of` (unit features (B, D), kept windows (B, P, W)): (B, `dim`)."""
        return Adapted(self.backbone_, lambda x: of(*look(self.backbone_, x, self.layer, self.sizes, self.keep)), dim)

    def _compared(self, x: Tensor, found: Tensor) -> Tensor:
        """Unit features (B, D) and kept windows (B, P, W) -> the features with local logits (B, D + C)."""
        values = one_hot(self.unit_labels_, len(self.weight_)).float()
        return compared(x, found - self.centre_, self.down_, self.up_, self.units_, values, self.local_beta)

    def _logits(self, images: Tensor) -> Tensor:
        x, local = images[:, : self.dim_], images[:, self.dim_ :]  # (B, D), (B, C)
        cache = cache_logits(x, self.keys_, self.values_, self.beta_)
        return x @ self.weight_.T + self.alpha_ * cache + self.gamma_ * local

    def image_logits(self, images: Any, *, on_error: str = "raise", progress: bool = False) -> tuple[Tensor, list[int]]:
        """See `Classifier.image_logits`."""
        tower = self._tower(lambda *seen: self._logits(self._compared(*seen)), len(self._fitted("class_names_")))
        encoded = encode_images(tower, images, cache=False, on_error=on_error, progress=progress)
        return encoded.features, encoded.kept
