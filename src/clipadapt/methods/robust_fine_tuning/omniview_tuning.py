"""Omniview-Tuning: low-rank weights of the image tower that draw each object's most unlike views to its centre.

    loss = InfoNCE(images, captions) + weight * mean over outliers of (1 - cos(z, centre of the image's object))

Before each epoch every view is encoded; an object's centre is the weighted mean of its views, and its `outliers` views
of least cosine to the centre are those that the second term sees (a maximum over views inside the minimum over
weights). Trained are low-rank pairs on the attention inputs of the image tower, and one on its last projection, the
"viewpoint module"; all of it is merged into the weights. The text tower stays frozen, so new classes are served.

Ruan et al., "Omniview-Tuning: Boosting Viewpoint Invariance of Vision-Language Pre-training Models" (arXiv
2404.12139); of the paper only the abstract could be read. Details are those of the official repository
Heathcliff-saku/Omniview_Tuning: centres weigh a view by the inverse of its mean cosine to its 5 nearest, 5 outliers
of about 100 views, weight 1, rank 8 with scale 1 and no dropout on the image tower's queries, keys and values, AdamW
5e-5 with weight decay 0.05, betas 0.9 and 0.98, 30 epochs, cosine, gradient norm 1. The constant margin that its code
adds to each distance has no gradient and is left out (the term with other centres is switched off there).

Departures: captions are the classes' texts, of which a batch holds several alike; views are drawn from the images
where there are no photos of one object from several sides (`objects`, `views`); the official viewpoint module, two
transformer layers on the feature with residual 0.1, cannot become part of a plain tower, so a linear low-rank residual
takes its place; the logit scale is the backbone's own; batches of 64, where the official ones hold 512 views and 256
captioned ImageNet images, whose part the untouched images have here.
"""

from dataclasses import replace
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_images
from clipadapt.features.viewpoints import turned
from clipadapt.losses.contrastive import info_nce
from clipadapt.methods import Classifier, FineTuningMethod, TrainingData, hyper, method
from clipadapt.methods.kinds.weights import Outputs, References
from clipadapt.nn.updates import LowRank


def centre(views: Tensor, neighbours: int) -> Tensor:
    """Unit centre (D,) of an object's unit views (n, D), weighted by one over the mean cosine to their nearest.

    With 0 neighbours all views weigh the same.
    """
    weights = torch.ones(len(views), device=views.device)
    if neighbours and len(views) > 1:
        cosines = views @ views.T
        cosines.fill_diagonal_(-torch.inf)  # a view is not its own neighbour
        nearest = cosines.topk(min(neighbours, len(views) - 1), dim=1).values.mean(1)  # (n,)
        weights = torch.where(nearest == 0, 0.0, 1 / (nearest + 1e-8))
    return normalize(weights @ views, dim=0)


def aligned(views: Tensor, objects: Tensor, outliers: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """Centres (O, D) of all objects and which views (N,) are among their object's `outliers`, the farthest from it.

    views (N, D) unit rows; objects (N,) numbers from 0.
    """
    count = int(objects.max()) + 1
    centres = torch.stack([centre(views[objects == o], neighbours) for o in range(count)])
    cosines = (views * centres[objects]).sum(1)
    far = torch.zeros(len(views), dtype=torch.bool, device=views.device)
    for o in range(count):
        (rows,) = torch.where(objects == o)
        far[rows[cosines[rows].argsort(stable=True)[:outliers]]] = True
    return centres, far


def object_numbers(data: Dataset, objects: str) -> list[int]:
    """Which object each of N images shows, numbered from 0 by first sight; never one object in two classes."""
    if objects == "domain" and data.domains is None:
        raise ClipadaptError('omniview-tuning: objects="domain" needs a data set with domains.')
    kinds: dict[str, list[Any]] = {
        "picture": list(range(len(data))),
        "class": [""] * len(data),
        "folder": [str(PurePath(item.name).parent) for item in data.items],
        "domain": data.domains or [],
    }
    numbers: dict[tuple[int, Any], int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in zip(data.labels, kinds[objects], strict=True)]


def sites(model: Backbone, module: bool) -> list[str]:
    """The linear layers of the image tower that get an update, its projection as the viewpoint module included."""
    if module and "class-token" not in model.capabilities:
        raise ClipadaptError(
            f"omniview-tuning: the image tower of {model.source} does not end in a linear projection, which the "
            "viewpoint module becomes part of; set module=False."
        )
    return [*model.target_modules("vision"), *(["visual_projection"] if module else [])]


@method(
    "omniview-tuning",
    title="Omniview-Tuning: Boosting Viewpoint Invariance of Vision-Language Pre-training Models",
    arxiv="2404.12139",
    problem="classification from any viewpoint",
    trains="low-rank weights",
    new_classes=True,
)
class OmniviewTuning(FineTuningMethod, Classifier):
    """Low-rank tuning towards features that do not depend on the viewpoint.

    >>> model = create("omniview-tuning", epochs=1, views=1).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    objects: str = hyper(
        "picture",
        'which images show one object: each its own, or those of a class that share "class", "folder" or "domain"',
        choices=("picture", "class", "folder", "domain"),
    )
    views: int = hyper(5, "drawn views next to each image, turned as a flat sheet", low=0)
    tilt: float = hyper(45.0, "greatest angle of a drawn view about both axes of the image, degrees", low=0, high=80)
    roll: float = hyper(30.0, "greatest angle of a drawn view in the image's plane, degrees", low=0, high=180)
    weight: float = hyper(1.0, "weight of the alignment of views (official)", low=0)
    outliers: int = hyper(2, "views of an object that are drawn to its centre (official: 5 of about 100)", low=1)
    neighbours: int = hyper(5, "nearest views that a view's weight depends on; 0 weighs all alike (official)", low=0)
    rank: int = hyper(8, "rank of each update (official)", low=1)
    module: bool = hyper(True, "train the viewpoint module, a low-rank residual of the projection")
    lr: float = hyper(5e-5, "AdamW learning rate (official)", low=0)
    epochs: int = hyper(30, "passes over all views (official)", low=1)
    min_scale: float = hyper(1.0, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)

    weight_decay, warmup = 0.05, 0.0

    def _prepare(self, model: Backbone, data: TrainingData) -> TrainingData:
        numbers = torch.tensor(object_numbers(data.support, self.objects), device=model.device)
        self._objects = numbers.repeat_interleave(1 + self.views)  # (N,)
        every = turned(data.support, self.views, tilt=self.tilt, roll=self.roll, seed=self.seed, plain=True)
        return replace(data, support=every)

    def _update(self, towers: Backbone, data: TrainingData) -> LowRank:
        return LowRank(towers.model, sites(towers, self.module), self.rank)  # the update is B A itself

    def _saved(self, model: Backbone) -> LowRank:
        return LowRank.restore(self.update_, model.model, sites(model, self.module), self.rank)

    def _references(self, towers: Backbone, model: Backbone, support: Dataset) -> References:
        texts = normalize(self._text_classifier(model), dim=1).to(model.device)  # (C, D)
        return (lambda labels, number: {"text": texts[labels], "classes": texts}), None

    def _after_step(self, towers: Backbone, support: Dataset) -> dict[str, Any]:
        def alignment() -> tuple[Tensor, Tensor]:
            views = encode_images(towers, support, cache=False).features.to(towers.device)
            return aligned(views, self._objects, self.outliers, self.neighbours)

        def after_step(number: int) -> None:
            if (number + 1) % per_epoch == 0 and number + 1 < per_epoch * self.epochs:
                for kept, new in zip((self._centres, self._far), alignment(), strict=True):
                    kept.copy_(new)

        per_epoch = -(-len(support) // self.batch_size)
        self._centres, self._far = alignment()
        return {"after_step": after_step, "state": (self._centres, self._far)}

    def _objective(self, out: Outputs) -> Tensor:
        loss, far = info_nce(out["image"], out["text"], out["scale"]), self._far[out["rows"]]
        if not far.any():
            return loss
        centres = self._centres[self._objects[out["rows"]]]
        return loss + self.weight * (1 - (out["image"] * centres).sum(1))[far].mean()

    def _optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.98), eps=1e-6)
