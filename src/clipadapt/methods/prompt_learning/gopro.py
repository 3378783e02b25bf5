"""GOPro: each image's style and content shift the context; augmented views tie the prompts and a projector together.

    shift(x) = rho over blocks l of ( A_l (mu_l + sigma_l) / 2 + a_l + B_l mu_l + b_l ) / 2       one (W,) per image
    t_c(x) = text(start, v_1 + shift(x) .. v_M + shift(x), NAME_c, ".", end)      logits_c = s <P(x), unit(t_c(x))>
    min  CE(logits(x), y) + w_p ( |t(x) - t(x')|^2 + |t(x) - t(x")|^2 ) + w_v NT-Xent(P(x), P(x'); temperature 0.1)

mu_l and sigma_l are mean and deviation over the hidden states that block l of the frozen image tower leaves, rho one
linear map over the blocks, P a projector of the frozen image feature; x' is a MoCo v3 view and x" an AugMix view of
image x, and the squares are means over classes and dimensions.

Singha et al., "GOPro: Generate and Optimize Prompts in CLIP using Self-Supervised Learning" (arXiv 2308.11605). Its
abstract was read, and of the official repository mainaksingha01/GOPro the architecture figure and the code: M = 4
vectors started from "a photo of a", w_p = 1, w_v = 0.1, SGD 2e-3 as in CoOp, 50 epochs, batch 4.

In the released code P enters the contrastive loss only, which shares no learned number with the logits then and cannot
change a prediction (`projector="contrast"`: a linear map with batch norm). The figure has P(x) enter both losses: the
default, with P(x) = unit(x + W x + b) started at W = b = 0, which is our choice. Further departures: the released code
augments pixels that are already normalised, and takes the AugMix views of a whole batch from its first image; here
images are augmented, each its own. Its unused network `meta_net` and its choice of the epoch on test images are
left out, and the image itself is seen without random crops.

Shifts start as long as PyTorch's initial maps make them: on the embedded model ten times as long as the word vectors
that they are added to, which then mean little. `start="zero"` (ours) starts rho at zero, and so from CoOp's prompts; on
scikit-learn's digits it was better in both settings tried (8 shots, 20 epochs: 41% against 24%, 37% against 26%).

As the towers are frozen, features and statistics of each image and of `views` pairs of its augmented views are
encoded once, before training; epoch e sees pair e modulo `views`, where the released code draws new ones.
"""

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from clipadapt.backbones import Backbone
from clipadapt.data import Item
from clipadapt.features.augmentations import augmix, moco_v3
from clipadapt.features.views import RandomView
from clipadapt.losses.contrastive import nt_xent
from clipadapt.methods import Classifier, PromptMethod, TrainingData, hyper, method
from clipadapt.methods.kinds.contexts import ShiftedLearner
from clipadapt.methods.kinds.prompts import Batch
from clipadapt.training.loop import Loss


def statistics(hidden: Tensor) -> Tensor:
    """Hidden states of a block (B, L, W) -> their mean and deviation (B, 2, W)."""
    deviation, mean = torch.std_mean(hidden, dim=1, correction=0)
    return torch.stack([mean, deviation], 1)


def encode_with_statistics(backbone: Backbone, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) -> unit features (B, D) and the statistics of all blocks (B, blocks, 2, W)."""
    seen: list[Tensor] = []

    def read(hidden: Tensor) -> None:
        seen.append(statistics(hidden))

    with torch.no_grad(), backbone.after_blocks("vision", dict.fromkeys(range(len(backbone.blocks("vision"))), read)):
        features = backbone.encode_images(pixels)
    return features, torch.stack(seen, 1)


def views_of(backbone: Backbone, item: Item, pairs: int, seed: int, min_scale: float) -> Tensor:
    """Pixels of an image, then of `pairs` MoCo v3 and AugMix views in turn: (1 + 2 * pairs, 3, H, W)."""
    image, content = item.open(), item.digest()
    views = [backbone.preprocess(image)]
    for number in range(2 * pairs):
        crop = RandomView(number, seed, min_scale).of(image, content, backbone.image_size)
        rng = random.Random(f"{content} {number} {seed}")
        views.append(augmix(crop, backbone.preprocess, rng) if number % 2 else backbone.preprocess(moco_v3(crop, rng)))
    return torch.stack(views)


class StyleLearner(ShiftedLearner):
    """A context (M, W), the maps from an image's statistics to its shift, and a projector of its feature."""

    def __init__(self, of: Any, backbone: Backbone, class_names: Sequence[str]) -> None:
        super().__init__(of, backbone, class_names)
        depth, maps = len(backbone.blocks("vision")), (backbone.width("vision"), backbone.width("text"))
        self.style = nn.ModuleList(nn.Linear(*maps) for _ in range(depth))
        self.content = nn.ModuleList(nn.Linear(*maps) for _ in range(depth))
        self.rho = nn.Linear(depth, 1)
        if of.start == "zero":
            nn.init.zeros_(self.rho.weight)
            nn.init.zeros_(self.rho.bias)
        self.projector = nn.Linear(backbone.dim, backbone.dim)
        self.in_logits = of.projector == "logits"
        if self.in_logits:
            nn.init.zeros_(self.projector.weight)
            nn.init.zeros_(self.projector.bias)
        else:
            self.norm = nn.BatchNorm1d(backbone.dim, track_running_stats=False)

    def shift(self, statistics: Tensor) -> Tensor:
        """(B, blocks, 2, Wv) -> (B, Wt)"""
        mean, style = statistics[:, :, 0], statistics.mean(2)  # (B, blocks, Wv)
        pairs = zip(self.style, self.content, strict=True)
        mixed = torch.stack([(a(style[:, i]) + b(mean[:, i])) / 2 for i, (a, b) in enumerate(pairs)], -1)
        return self.rho(mixed)[..., 0]  # from (B, Wt, blocks)

    def projected(self, features: Tensor) -> Tensor:
        """Unit features (B, D) -> what the logits take, (B, D)"""
        return normalize(features + self.projector(features), dim=-1) if self.in_logits else features

    @property
    def image_dim(self) -> int:
        return self.backbone.dim + self.backbone.width("text")

    def images(self, pixels: Tensor) -> Tensor:
        """The projected feature and the shift of each image, one behind the other (B, D + W)."""
        features, seen = encode_with_statistics(self.backbone, pixels)
        return torch.cat([self.projected(features), self.shift(seen)], 1)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """(B, D + W) -> (B, C)"""
        dim = self.backbone.dim
        return self.logit_scale * self.cosines(images[:, :dim], images[:, dim:])

    def loss(self, batch: Batch) -> Loss:
        """`batch.features` are (B, 3, D + blocks * 2 * Wv): of the image, its MoCo v3 view and its AugMix view."""
        assert batch.features is not None
        dim, shape = self.backbone.dim, (len(self.style), 2, self.backbone.width("vision"))
        features, seen = batch.features[..., :dim], batch.features[..., dim:].unflatten(-1, shape)
        shifts = self.shift(seen.flatten(0, 1))  # (B * 3, W)
        itself, moco, mixed = self.texts_for(shifts).unflatten(0, (-1, 3)).unbind(1)  # (B, C, D) each
        logits = self.logit_scale * torch.einsum("bd,bcd->bc", self.projected(features[:, 0]), itself)
        loss = cross_entropy(logits, batch.labels)
        loss = loss + self.of.consistency * ((itself - moco).square().mean() + (itself - mixed).square().mean())
        if len(batch.labels) > 1:  # nothing to tell a single image from
            loss = loss + self.of.contrast * self.view_contrast(features[:, 0], features[:, 1])
        return loss, logits.argmax(1) == batch.labels

    def view_contrast(self, first: Tensor, second: Tensor) -> Tensor:
        """NT-Xent of the projected features of two views (B, D)."""
        if self.in_logits:
            return nt_xent(self.projected(first), self.projected(second), self.of.temperature)
        return nt_xent(self.norm(self.projector(first)), self.norm(self.projector(second)), self.of.temperature)


@method(
    "gopro",
    title="GOPro: Generate and Optimize Prompts in CLIP using Self-Supervised Learning",
    arxiv="2308.11605",
    trains="context vectors and projectors",
    new_classes=True,
)
class GoPro(PromptMethod, Classifier):
    """Context vectors shifted by an image's style and content, kept alike over augmented views.

    >>> model = create("gopro", epochs=1, views=1).fit(backbone, support)
    >>> model.with_classes(["red", "dog"]).predict_proba(queries).shape
    (8, 2)
    """

    epochs: int | None = hyper(50, "passes over the support set (official code)", low=1)
    batch_size: int = hyper(4, "images a step (official code)", low=1)
    views: int = hyper(4, "pairs of a MoCo v3 and an AugMix view of each image, encoded once, used in turn", low=1)
    min_scale: float = hyper(0.08, "least area of a view's crop, in (0, 1] (official code)", low=0.01, high=1)
    n_ctx: int = hyper(4, "context vectors M, where init is None", low=1)
    init: str | None = hyper("a photo of a", "words to start from, which set n_ctx (official); None: random")
    projector: str = hyper("logits", "where P acts: the figure, or the released code", choices=("logits", "contrast"))
    start: str = hyper("released", "rho: as PyTorch starts linear maps, or at zero shift", choices=("released", "zero"))
    consistency: float = hyper(1.0, "w_p: weight of prompt consistency (official code)", low=0)
    contrast: float = hyper(0.1, "w_v: weight of the visual contrastive loss (official code)", low=0)
    temperature: float = hyper(0.1, "temperature of the visual contrastive loss (official code)", low=1e-3)

    learner = StyleLearner

    def _batches(self, backbone: Backbone, data: TrainingData) -> Callable[[Tensor, int], Batch]:
        support, labels = data.support, torch.tensor(data.support.labels, device=backbone.device)

        def load(item: Item) -> Tensor:
            return views_of(backbone, item, self.views, self.seed, self.min_scale)

        encoded = []
        with ThreadPoolExecutor() as threads:  # Pillow works without the interpreter's lock
            for chunk in torch.arange(len(support)).split(max(1, 64 // (1 + 2 * self.views))):
                pixels = torch.stack(list(threads.map(load, [support.items[i] for i in chunk])))  # (b, 1 + 2 V, ...)
                features, seen = encode_with_statistics(backbone, pixels.flatten(0, 1))
                encoded.append(torch.cat([features, seen.flatten(1)], 1).unflatten(0, pixels.shape[:2]))
        table = torch.cat(encoded)  # (N, 1 + 2 V, D + blocks * 2 * Wv)

        def batch(rows: Tensor, epoch: int) -> Batch:
            pair = 1 + 2 * (epoch % self.views)
            return Batch(rows, labels[rows], table[rows][:, [0, pair, pair + 1]], None)

        return batch
