"""Methods that train both towers on images with captions and leave an ordinary, better `Backbone` in `backbone_`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from torch import Tensor

from clipadapt.backbones import Backbone
from clipadapt.losses.contrastive import contrast
from clipadapt.methods.base import Method
from clipadapt.methods.card import hyper
from clipadapt.methods.registry import create
from clipadapt.methods.training_data import TrainingData
from clipadapt.training.contrastive import train_contrastive
from clipadapt.training.loop import Run, seeded
from clipadapt.training.objective import Terms
from clipadapt.training.pairs import DrawnPairs
from clipadapt.training.recipe import Recipe
from clipadapt.training.towers import IMAGE_PARTS


@dataclass(kw_only=True)
class Pretraining(Method):
    """A method that trains a backbone; a saved one keeps the weights that it changed.

    Write `_towers` where the structure changes, `_objective` where the loss does, `_recipe` for other numbers.
    """

    kind: ClassVar[str] = "pretraining"

    steps: int = hyper(1000, "batches to learn from", low=1)
    batch_size: int = hyper(64, "pairs a step, each a negative of the others", low=2)
    lr: float = hyper(1e-5, "AdamW learning rate at its peak", low=0)
    seed: int = hyper(1, "order of the pairs, and what else is drawn")

    def _towers(self, model: Backbone) -> Backbone:
        """What training starts from: the model, perhaps `edited`; it is copied and stays as it is."""
        return model

    def _objective(self, out: dict[str, Tensor]) -> Terms:
        """The loss of named outputs, see `training.objective`: by default that of CLIP."""
        return contrast(out)

    def _recipe(self) -> Recipe:
        """The numbers of the run: the latest weights, without an average of them."""
        return Recipe(
            steps=self.steps, batch_size=self.batch_size, learning_rate=self.lr, seed=self.seed, precision="fp32",
            ema_decay=0.0, log_every=1, evaluate_every=0, workers=0,
        )  # fmt: skip

    def _learn(self, model: Backbone, data: TrainingData, run: Run) -> None:
        recipe, start, report = self._recipe(), self._start(model), run.report
        towers, source = start.copy(), DrawnPairs(data.support, model.preprocess)
        weights = towers.model.named_parameters()
        locked = () if recipe.towers == "both" else IMAGE_PARTS
        run.trained = sum(weight.numel() for name, weight in weights if not name.startswith(locked))
        on_log = None if report is None else (lambda line: report({"steps": recipe.steps, **line}))
        with TemporaryDirectory() as aside:
            out, objective = run.folder or aside, self._objective
            trained = train_contrastive(towers, source, recipe, out, objective=objective, on_log=on_log)
        before = start.weights()
        self.update_ = {n: w.cpu() for n, w in trained.weights().items() if not torch.equal(w, before[n])}
        self._restore(model)

    def _start(self, model: Backbone) -> Backbone:
        with seeded(self.seed):  # new parts of a tower may start at random
            return self._towers(model)

    def _restore(self, model: Any) -> None:
        self.backbone_ = self._start(model).with_weights({n: w.to(model.device) for n, w in self.update_.items()})

    def with_classes(self, class_names: Sequence[str]) -> Any:
        """A zero-shot classifier of these classes by `backbone_`."""
        zero_shot, model = create("zero-shot", templates=self.templates), self._model("it has no towers")
        return zero_shot.fit(model, class_names=class_names)
