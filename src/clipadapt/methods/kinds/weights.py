"""Methods that change weights: an `Update` of the towers, trained on pixels by an objective.

Such a method says what learns (`_update`) and what is minimised (`_objective`); this module trains it, keeps the
update's tensors (and nothing else), and merges them into a backbone that shares all other weights with the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipadapt.backbones import Backbone
from clipadapt.backbones.weights import weight_names
from clipadapt.data import Dataset, class_texts
from clipadapt.errors import ClipadaptError
from clipadapt.features import Adapted, Encoder, encode_classes
from clipadapt.methods.base import Method
from clipadapt.methods.card import hyper
from clipadapt.methods.training_data import TrainingData
from clipadapt.nn.updates import Full, Update
from clipadapt.training.averages import Average
from clipadapt.training.loop import Loss, Run, batches, seeded, stream, train
from clipadapt.training.pixels import Pixels
from clipadapt.training.schedules import cosine

TOWERS = {"vision": ("vision_model.", "visual_projection."), "text": ("text_model.", "text_projection.")}

# Of a step: image (B, D), classes or head (C, D) or text (B, D), labels (B,), pixels (B, 3, H, W), rows (B,), scale,
# the numbers of the step and epoch from 0, and of some methods logits (B, C).
Outputs = dict[str, Any]
# What images are compared with, as outputs of a step's labels (B,) and number; and the head that is trained, if any.
References = tuple[Callable[[Tensor, int], Outputs], Tensor | None]
# How images (B, 3, H, W) are encoded (B, D), and the tensors that were learned for it.
ChangedImages = tuple[Callable[[Tensor], Tensor], dict[str, Tensor]]


def tower_weights(backbone: Backbone, tower: str) -> list[str]:
    """The names in `backbone.model` of the weights of a tower and its projection.

    tower: "vision", "text", or "both", which is all but the logit scale.
    """
    starts = TOWERS["vision"] + TOWERS["text"] if tower == "both" else TOWERS[tower]
    return [name for name in weight_names(backbone.model) if name.startswith(starts)]


def class_encoder(backbone: Backbone, class_names: Sequence[str], templates: Any) -> Callable[[], Tensor]:
    """A function that encodes the classes' texts as `encode_classes` does, but on the device and with gradients.

    Each call gives unit rows (C, D) by the text tower as it then is. Texts that classes share are encoded once, and
    in an order that does not depend on that of the classes.
    """
    sentences = class_texts(class_names, templates)
    unique = sorted({text for texts in sentences for text in texts})
    ids = backbone.tokenize(unique).to(backbone.device)  # (T, L)
    uses = torch.tensor([[texts.count(text) for text in unique] for texts in sentences], device=backbone.device).float()
    return lambda: normalize(uses @ backbone.encode_tokens(ids), dim=1)  # (C, T) @ (T, D) -> (C, D)


class Captions:
    """All captions of the classes, and one drawn for each image of a batch."""

    def __init__(self, backbone: Backbone, sentences: list[list[str]], seed: int) -> None:
        row_of = {text: row for row, text in enumerate(sorted({text for texts in sentences for text in texts}))}
        self.ids = backbone.tokenize([*row_of]).to(backbone.device)  # (T, L)
        self._rows = [torch.tensor([row_of[text] for text in texts]) for texts in sentences]
        self._backbone, self._seed = backbone, seed

    def draw(self, labels: Tensor, number: int) -> Tensor:
        """Rows of `ids` (B,) for images of these labels (B,); a function of the seed and the step's `number`."""
        shares = torch.rand(len(labels), generator=stream(self._seed, number)).tolist()
        chosen = [self._rows[c] for c in labels.tolist()]
        return torch.stack([rows[int(share * len(rows))] for rows, share in zip(chosen, shares, strict=True)])

    def encode(self, labels: Tensor, number: int) -> Tensor:
        """The drawn captions' features (B, D), with gradients; one that several images drew is encoded once."""
        drawn, place = self.draw(labels, number).unique(return_inverse=True)
        return self._backbone.encode_tokens(self.ids[drawn])[place]


@dataclass(frozen=True)
class Lesson:
    """What is minimised at each step (its number from 0, and its rows), and the head that learns with it, if any."""

    loss_of: Callable[[tuple[int, Tensor]], Loss]
    steps: list[tuple[int, Tensor]]
    head: Tensor | None


class WeightMethod(Method):
    """A method that changes weights: `fit` leaves `backbone_`, adapted, and the classifier `weight_` on it.

    Its hyper-parameters have `lr`, `batch_size`, `min_scale` and `seed`; see `FineTuningMethod` for the usual ones.
    """

    kind: ClassVar[str] = "weights"
    # What images are compared with in training: "classes", the class texts by the text tower as it learns, "frozen"
    # ones by the original, "captions" drawn for each image, or a "head" that starts as the zero-shot classifier.
    against: ClassVar[str] = "classes"
    weight_decay: ClassVar[float] = 0.1
    clip_norm: ClassVar[float | None] = 1.0  # greatest norm of the whole gradient

    update_: dict[str, Tensor] = {}  # what the update has learned

    # -- what a method says -----------------------------------------------------------------------------------------

    def _update(self, towers: Backbone, data: TrainingData) -> Update:
        """What learns, at its start values, which may be drawn from torch's global stream."""
        raise NotImplementedError

    def _saved(self, model: Backbone) -> Update:
        """The update that `update_` was saved of: by default whole weights."""
        return Full.restore(self.update_, model.model)

    def _objective(self, out: Outputs) -> Tensor:
        """The loss of a batch from what the towers made of it."""
        raise NotImplementedError

    def _factor(self) -> float:
        """How much of the update is merged: 0 is the original, 1 the update."""
        return 1.0

    def _outputs(self, towers: Backbone, out: Outputs) -> Outputs:
        """Add what the towers make of a batch: by default `image`, the images' features (B, D)."""
        return out | {"image": towers.encode_images(out["pixels"])}

    def _steps(self, support: Dataset) -> list[Tensor]:
        """The rows of every step."""
        hyper: Any = self
        return batches(len(support), hyper.batch_size, epochs=hyper.epochs, seed=hyper.seed)

    def _schedule(self, step: int, total: int) -> float:
        """The factor on the learning rate: by default half a cosine."""
        return cosine(step, total)

    def _optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        hyper: Any = self
        return torch.optim.AdamW(parameters, lr=hyper.lr, weight_decay=self.weight_decay)

    def _average(self, parameters: list[Tensor], steps: int) -> Average | None:
        """What takes the place of the last values: an average of them along the run, or None."""
        return None

    def _after_step(self, towers: Backbone, support: Dataset) -> dict[str, Any]:
        """Further arguments of `train`: what is done after a step, and the tensors that it changes (`state`)."""
        return {}

    # -- learning ---------------------------------------------------------------------------------------------------

    def _learn(self, model: Backbone, data: TrainingData, run: Run) -> None:
        hyper: Any = self
        known = set(vars(self))
        with seeded(hyper.seed):
            towers = model.with_weights({})
            update = self._update(towers, data).train()
            with update.attached(towers.model):
                head = self._descend(towers, model, data.support, update, run)
        for name in vars(self).keys() - known:
            delattr(self, name)  # what hooks kept for the training: mostly copies of weights
        self._take(model, update, None if self.head_from_text else head)

    def _take(self, model: Backbone, update: Update, head: Tensor | None = None) -> None:
        """Keep what an update has learned, and the classifier: `head`, or the class texts by the adapted towers."""
        self.update_ = update.tensors()
        self._merge(model)
        self.weight_ = self._adapted_classifier() if head is None else head

    def _descend(self, towers: Backbone, model: Backbone, support: Dataset, update: Update, run: Run) -> Tensor | None:
        """Train the update, attached to the towers; returns the head, where one was trained."""
        lesson = self._lesson(towers, model, support)
        learned = [*update.parameters(), *([] if lesson.head is None else [lesson.head])]
        average, more = self._average(learned, len(lesson.steps)), self._after_step(towers, support)
        if average is not None:
            more = {"after_step": average.update, "state": average.averages}
        train(
            lesson.loss_of,
            self._optimizer(learned),
            lesson.steps,
            schedule=lambda step: self._schedule(step, len(lesson.steps)),
            clip_norm=self.clip_norm,
            run=run,
            **more,
        )
        if average is not None:
            average.copy_to(learned)
        return None if lesson.head is None else lesson.head.detach().cpu()

    def _lesson(self, towers: Backbone, model: Backbone, support: Dataset) -> Lesson:
        """What the towers, to which an update is attached, are to learn of a support set."""
        hyper: Any = self
        labels = torch.tensor(support.labels, device=model.device)
        pixels = Pixels(model, support, min_scale=hyper.min_scale, seed=hyper.seed)
        references, head = self._references(towers, model, support)
        per_epoch = -(-len(support) // hyper.batch_size)

        def loss_of(step: tuple[int, Tensor]) -> Loss:
            number, rows = step
            out = {"number": number, "epoch": number // per_epoch, "rows": rows, "labels": labels[rows]}
            out |= {"pixels": pixels.batch(rows, number), "scale": self._scale(towers)}
            out = self._outputs(towers, out)  # before the texts: what is dropped at random depends on the order
            out |= references(labels[rows], number)
            return self._objective(out), _right(out)

        return Lesson(loss_of, [*enumerate(self._steps(support))], head)

    def _references(self, towers: Backbone, model: Backbone, support: Dataset) -> References:
        """What images are compared with; see `against`."""
        hyper: Any = self
        if self.against == "captions":
            captions = Captions(towers, class_texts(self.class_names_, self.templates), hyper.seed)
            return (lambda labels, number: {"text": captions.encode(labels, number)}), None
        if self.against == "head":
            head = self._text_classifier(model).to(model.device).requires_grad_()  # (C, D)
            return (lambda labels, number: {"head": head}), head
        if self.against == "frozen":
            frozen = self._class_texts(model).to(model.device)
            return (lambda labels, number: {"classes": frozen}), None
        classes = class_encoder(towers, self.class_names_, self.templates)
        if getattr(self, "tower", "both") != "vision":
            return (lambda labels, number: {"classes": classes()}), None
        with torch.no_grad():
            kept = classes()  # which no step changes
        return (lambda labels, number: {"classes": kept}), None

    def _scale(self, towers: Backbone) -> Any:
        """The factor on cosines."""
        return towers.logit_scale

    # -- the adapted model ------------------------------------------------------------------------------------------

    def _restore(self, model: Any) -> None:
        self._merge(model)
        if "weight_" not in vars(self):  # of models saved before it was kept
            self.weight_ = self._adapted_classifier()

    def _merge(self, model: Any) -> None:
        """Make the adapted model of the original and what the update has learned."""
        update = self._saved(model) if self.update_ else None
        if update is not None and not update.mergeable:
            self.backbone_, self._towers, self._attachable = model, model.with_weights({}), update
            return
        changes: Any = {}
        if update is not None:
            changes = update.changes(self._factor()) if update.cheap else update.merged(model.model, self._factor())
        self.backbone_, self._changed = model.with_weights(changes), list(changes)

    def changed(self) -> dict[str, Tensor]:
        """The adapted weights by their names in `backbone.model`; all others are those of the original."""
        weights = self._model("it has no towers").weights()
        return {name: weights[name] for name in getattr(self, "_changed", ())}

    @contextmanager
    def attached(self) -> Iterator[Backbone]:
        """Towers whose encodings are the adapted ones while it lasts; of merged updates, simply `backbone_`."""
        model = self._model("it has no towers")
        if not hasattr(self, "_attachable"):
            yield model
            return
        with self._attachable.attached(self._towers.model):
            yield self._towers

    @property
    def plain_texts(self) -> bool:
        """See `Classifier.plain_texts`."""
        return not hasattr(self, "_attachable")

    @property
    def head_from_text(self) -> bool:
        """Whether the adapted text tower encodes the classifier, which else is a trained head."""
        return self.against != "head"

    def _changed_images(self, model: Backbone) -> ChangedImages | None:
        """How images are encoded where `backbone_` alone does not do it."""
        if not hasattr(self, "_attachable"):
            return None

        def encode(pixels: Tensor) -> Tensor:
            with self.attached() as towers:
                return towers.encode_images(pixels)

        return encode, self.update_

    @property
    def encoder(self) -> Encoder:
        """See `Classifier.encoder`."""
        model = self._model("it has no towers to encode with")
        changed = self._changed_images(model)
        if changed is None:
            return model
        encode, learned = changed
        return Adapted(model, encode, model.dim, self._adapted_fingerprint(model, learned), aligned=True)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """See `Classifier.encode_texts`."""
        with self.attached() as towers:
            return towers.encode_texts(texts)

    def _adapted_classifier(self) -> Tensor:
        with self.attached() as towers:
            return (towers.logit_scale * encode_classes(towers, self.class_names_, self.templates)).cpu()

    def _reclassify(self, model: Any) -> None:
        self.weight_ = self._adapted_classifier()

    def export(self, folder: str | Path) -> None:
        """Write the adapted towers as a plain transformers folder that any other program can load.

        Raises:
            ClipadaptError: what was learned is not weights of the towers, or transformers has no class for them.
        """
        model = self._model("it has no towers to export")
        if "trunk" in model.capabilities:
            raise ClipadaptError(
                f"{self.card.key}: transformers has no class for towers behind a trunk ({model.source}); export ONNX."
            )
        if not self.plain_texts or self._changed_images(model) is not None:
            raise ClipadaptError(
                f"{self.card.key}: what it learned is not weights of the towers and cannot be exported."
            )
        model.save(folder)


def _right(out: Outputs) -> Tensor:
    """Which images of a batch are nearest to their own class, or to a caption of it (B,)."""
    with torch.no_grad():
        if "logits" in out:
            return out["logits"].argmax(1) == out["labels"]
        if "text" in out:
            return out["labels"][(out["image"] @ out["text"].T).argmax(1)] == out["labels"]
        return (out["image"] @ (out["head"] if "head" in out else out["classes"]).T).argmax(1) == out["labels"]


@dataclass(kw_only=True)
class FineTuningMethod(WeightMethod):
    """Base of the methods that fine-tune for some epochs; the hyper-parameters get the values of the method's paper."""

    warmup: ClassVar[float] = 0.1  # share of the run in which the rate rises

    lr: float = hyper(1e-5, "AdamW learning rate", low=0)
    epochs: int = hyper(10, "passes over the support set", low=1)
    batch_size: int = hyper(64, "images a step", low=1)
    min_scale: float = hyper(0.9, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)
    seed: int = hyper(1, "what is drawn at random: crops, the order of the images, initial values")

    def _schedule(self, step: int, total: int) -> float:
        return cosine(step, total, int(self.warmup * total))
