"""What every method is: a card, hyper-parameters, `fit`, and a fitted state that predicts, scores and saves itself.

A method is a dataclass. Its fields are hyper-parameters; `fit` learns and returns self; what was learned stands in
attributes that end in an underscore. Three bases, by what a method needs:

* `FeatureMethod`: sees only tensors. Write `_fit(support)` and `_logits(images)`.
* `Method` itself: towers take part in training but stay as they are (prompts). Write `_fit_towers` and `_logits`.
* `WeightMethod`: towers change. `_fit_towers` leaves `backbone_`, an adapted copy, and `weight_`, the classifier on it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from clipadapt.data import Dataset, MultiLabelDataset, as_items
from clipadapt.errors import ClipadaptError, unknown_name
from clipadapt.features import encode_classes, encode_images, other_tower
from clipadapt.metrics.multilabel import best_threshold, mean_average_precision
from clipadapt.training.loop import Report, Run

if TYPE_CHECKING:
    from clipadapt.backbones import Backbone

Array = Tensor | np.ndarray


@dataclass(frozen=True)
class Card:
    """The facts of a method, shown by `clipadapt methods` and checked by the conformance suite.

    `signal` says what `fit` learns from: "none" (class names only), "labels" (a labelled support set) or "unlabelled"
    (pictures without labels; labelled ones are welcome). `unlabelled`: `fit(..., unlabelled=)` is of use to it; where
    the signal is "labels", unlabelled pictures alone then do as well. `requires` names the backbone capabilities
    without which the method refuses. `new_classes`: a fitted one can be used for classes that it has not learned
    (`with_classes`), as base-to-new protocols do. `multi_label`: it also takes pictures that each show any number of
    classes (`MultiLabelDataset`), and then says of each class if it is there.
    """

    key: str
    title: str
    arxiv: str | None
    family: str
    task: str
    trains: str
    signal: str
    requires: frozenset[str] = frozenset()
    new_classes: bool = False
    multi_label: bool = False
    unlabelled: bool = False


def hyper(default: Any, doc: str, *, low: float | None = None, high: float | None = None, choices: Any = None) -> Any:
    """A hyper-parameter field: its default, what it is (unit, range, source), and the values it may take."""
    meta = {"doc": doc, "low": low, "high": high, "choices": choices}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default, metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Support:
    """What a feature method learns from: unit features, labels, and the classes' unit text features."""

    images: Tensor  # (N, D)
    labels: Tensor  # (N,) int64 in [0, C); (N, C) bool where a picture can show several classes
    texts: Tensor  # (C, D)
    logit_scale: float
    val: tuple[Tensor, Tensor] | None = None  # (V, D), labels: for choosing hyper-parameters, never for training
    unlabelled: Tensor | None = None  # (U, D), for methods whose card has `unlabelled`

    @cached_property
    def one_hot(self) -> Tensor:
        if self.labels.ndim == 2:
            return self.labels.to(self.images.dtype)  # (N, C)
        return one_hot(self.labels, len(self.texts)).to(self.images.dtype)  # (N, C)

    @property
    def zero_shot(self) -> Tensor:
        """Zero-shot logits of the support itself."""
        return self.logit_scale * self.images @ self.texts.T  # (N, C)


@dataclass(kw_only=True)
class Method:
    """Base of all methods; see the module's docstring for which of its three children to write."""

    card: ClassVar[Card]
    # The values that `--method auto` tries, per hyper-parameter: the ranges that the method's paper searches.
    search_space: ClassVar[dict[str, Sequence[Any]]] = {}
    # Settings that make a run of seconds, for tests and first tries; empty where the defaults already do.
    tiny: ClassVar[dict[str, Any]] = {}

    multi_label_ = False  # of the class: for models saved before there were such methods

    templates: Any = hyper("photo", "prompt templates of the class names: a set's name, template(s), file or mapping")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, low, high, choices = getattr(self, f.name), *map(f.metadata.get, ("low", "high", "choices"))
            where = f"{self.card.key}: {f.name} = {value!r}"
            if choices is not None and value not in choices:
                raise ClipadaptError(f"{where} is not one of {', '.join(map(repr, choices))}.")
            if (low is None and high is None) or value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ClipadaptError(f"{where} is not a number.")
            if (low is not None and value < low) or (high is not None and value > high):
                bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
                raise ClipadaptError(f"{where} is out of range; it must be {bounds}.")

    @classmethod
    def hyperparameters(cls) -> list[str]:
        """The names of its hyper-parameters."""
        return [f.name for f in dataclasses.fields(cls)]

    # -- learning ---------------------------------------------------------------------------------------------------

    def fit(
        self,
        backbone: Backbone,
        support: Dataset | MultiLabelDataset | None = None,
        *,
        unlabelled: Any = None,
        val: Dataset | MultiLabelDataset | None = None,
        class_names: Sequence[str] | None = None,
        report: Report | None = None,
        resume: str | Path | None = None,
    ) -> Self:
        """Learn from a labelled `support` set (or only from `class_names`, where the card's signal is "none").

        `unlabelled` are pictures (paths, PIL, a data set, whose labels are not looked at) for methods whose card says
        that they learn from such; with these, `class_names` may stand for the support set.

        `val` chooses hyper-parameters where the method's paper does so; nothing is ever trained on it. `report` is
        called after every training step with a dict of step, steps, loss, lr, seconds and, for some methods, accuracy.
        In the folder `resume` a training run keeps its state until it ends: the same call goes on where an interrupted
        one was, to the same result.

        A `MultiLabelDataset`, which has no picture where a method learns from names only, makes a multi-label model:
        `multi_label_` is true, and `threshold_` the score from which on a class counts as shown. It has the highest
        overall F1 on `val`, or without it on `support`, whose scores are too good where they were learned from; it is
        None where there is no picture.
        """
        data: Any = self._open(backbone, support, class_names, 0 if unlabelled is None else len(unlabelled))
        if val is not None and isinstance(val, MultiLabelDataset) != self.multi_label_:
            raise ClipadaptError(f"{self.card.key}: val must have labels of the same kind as the support set.")
        folder = Path(resume) / self._identity(backbone, data, unlabelled) if resume is not None else None
        held_out: Any = val
        more = {} if unlabelled is None else {"unlabelled": unlabelled}
        self._fit_towers(backbone, data, held_out, Run(report, folder), **more)
        if self.multi_label_:
            judged = data if held_out is None else held_out
            self._choose_threshold(judged.targets, self.image_logits(judged)[0] if len(judged) else None)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        return self

    def _identity(self, backbone: Backbone, support: Dataset, unlabelled: Any = None) -> str:
        """What a training run depends on, as 32 hex digits."""
        from clipadapt.methods.artifact import recipe

        pictures = [item.digest() for item in [*support.items, *as_items([] if unlabelled is None else unlabelled)]]
        facts = [recipe(self), backbone.fingerprint, pictures, support.labels, support.class_names]
        return blake2b(json.dumps(facts, default=sorted).encode(), digest_size=16).hexdigest()

    def _fit_towers(self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run) -> None:
        """The method's own `fit`, on a support set that has been checked.

        Where the card has `unlabelled`, it takes `unlabelled: Any = None` after `run`.
        """
        raise NotImplementedError

    def _open(
        self,
        backbone: Backbone,
        support: Dataset | MultiLabelDataset | None,
        class_names: Sequence[str] | None,
        n_unlabelled: int = 0,
    ) -> Dataset | MultiLabelDataset:
        """Refuse what cannot work, remember the backbone and the classes, and give the support set back."""
        missing = self.card.requires - backbone.capabilities
        if missing:
            raise ClipadaptError(
                f"{self.card.key} needs a backbone with {', '.join(sorted(missing))}; {backbone.source} has "
                f"{', '.join(sorted(backbone.capabilities)) or 'none of the optional capabilities'}."
            )
        if support is None:
            if class_names is None:
                raise ClipadaptError(f"{self.card.key}.fit needs a support set or class_names.")
            support = Dataset(items=[], labels=[], class_names=list(class_names))
        self._start(isinstance(support, MultiLabelDataset))
        self._check_signal(len(support), n_unlabelled)
        if len(support.class_names) < 2:
            raise ClipadaptError(f"{self.card.key} needs at least two classes, not {support.class_names}.")
        self.backbone_: Backbone | None = backbone
        self.origin_: dict[str, str] | None = {"source": backbone.source, "fingerprint": backbone.fingerprint}
        self.class_names_ = list(support.class_names)
        self.dim_ = backbone.dim
        return support

    def _check_signal(self, n_labelled: int, n_unlabelled: int) -> None:
        card = self.card
        if n_unlabelled and not card.unlabelled:
            raise ClipadaptError(f"{card.key} has no use for unlabelled pictures.")
        if card.signal == "unlabelled" and not n_unlabelled:
            raise ClipadaptError(f"{card.key} learns from unlabelled pictures: give fit(..., unlabelled=).")
        if card.signal == "labels" and not (n_labelled or n_unlabelled):
            raise ClipadaptError(f"{card.key} learns from labelled pictures, and the support set has none.")

    def _start(self, multi_label: bool) -> None:
        """Remember of which kind the labels are; refuse sets of them where the method has no use for them."""
        if multi_label and not self.card.multi_label:
            raise ClipadaptError(f"{self.card.key} learns from pictures of one class each, and these can show several.")
        self.multi_label_ = multi_label
        self.threshold_: float | None = None

    def _choose_threshold(self, targets: Any, scores: Tensor | None) -> None:
        if scores is not None and np.any(targets):
            self.threshold_ = best_threshold(targets, scores)

    def with_classes(self, class_names: Sequence[str]) -> Self:
        """This fitted method for other classes, by their names alone; itself stays as it is. Nothing is refitted.

        Raises ClipadaptError for a method that ties what it learned to its classes (see `Card.new_classes`).
        """
        if not self.card.new_classes:
            raise ClipadaptError(f"{self.card.key} ties what it learns to its classes; fit it again for others.")
        backbone = self._fitted("backbone_")
        if backbone is None:
            raise ClipadaptError(f"This {self.card.key} was fitted on features, with no text tower for new classes.")
        if len(class_names) < 2:
            raise ClipadaptError(f"{self.card.key} needs at least two classes, not {list(class_names)}.")
        other = copy.copy(self)
        other.class_names_ = list(class_names)
        other._reclassify(backbone)
        return other

    def _reclassify(self, backbone: Backbone) -> None:
        """After `class_names_` changed: what depends on them, anew."""
        self._restore(backbone)

    # -- predicting -------------------------------------------------------------------------------------------------

    def logits(self, image_features: Array) -> Array:
        """(N, D) image features, unit or not -> (N, C) logits, of the type that was given (torch or numpy)."""
        with torch.no_grad():
            out = self._logits(unit(image_features, "image_features", dim=self._fitted("dim_")))
        return out.numpy() if isinstance(image_features, np.ndarray) else out

    def _logits(self, images: Tensor) -> Tensor:
        """The method's classifier: (N, D) unit features -> (N, C)."""
        raise NotImplementedError

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, 3, H, W) -> what `_logits` takes of them (B, K), with gradients to the pixels."""
        return self._fitted("backbone_").encode_images(pixels)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """T texts -> (T, D) unit features, as this model's text side sees them, in the space of `encode_pixels`."""
        return self._fitted("backbone_").encode_texts(texts)

    @property
    def image_fingerprint(self) -> str:
        """Of what `encode_pixels` computes: embeddings of pictures are good for all models that share it."""
        tower = self._fitted("backbone_").image_fingerprint
        beside = self._beside_image_tower()
        if not beside:
            return tower
        from clipadapt.methods.artifact import recipe

        digest = blake2b(json.dumps([tower, recipe(self)], default=str).encode(), digest_size=16)
        for name in sorted(beside):
            digest.update(name.encode() + beside[name].detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _beside_image_tower(self) -> dict[str, Tensor]:
        """What was learned that changes `encode_pixels`, but is none of the weights of `backbone_`."""
        return {}

    def image_tower(self) -> Any:
        """What `encode_images` and `encode_shard` take as a backbone, to encode pictures as this model does.

        Raises ClipadaptError where what the model takes of a picture is no point of the space of texts.
        """
        backbone = self._fitted("backbone_")
        if backbone is None:
            raise ClipadaptError(f"This {self.card.key} was fitted on features, with no towers to encode with.")
        return other_tower(backbone, self.encode_pixels, backbone.dim, self.image_fingerprint)

    def image_logits(self, images: Any, *, on_error: str = "raise", progress: bool = False) -> tuple[Tensor, list[int]]:
        """Logits (M, C) of pictures (paths, PIL, a data set, or (N, 3, H, W) pixels) and which of them they are."""
        backbone = self._fitted("backbone_")
        if backbone is None:
            raise ClipadaptError(f"This {self.card.key} was fitted on features: give logits() features, not pictures.")
        # Adapted towers exist once; keeping their features would only fill the disk.
        shared = self.origin_ is not None and backbone.fingerprint == self.origin_["fingerprint"]
        encoded = encode_images(backbone, images, cache=shared, on_error=on_error, progress=progress)
        with torch.no_grad():
            return self._logits(encoded.features), encoded.kept

    def predict_proba(self, images: Any) -> np.ndarray:
        """Class probabilities (N, C) of pictures; columns in the order of `class_names_`.

        Those of a multi-label model do not depend on one another: sigmoid(logit - `threshold_`), not calibrated.
        """
        return self.probabilities(self.image_logits(images)[0]).numpy()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (N, C) as `image_logits` gives them -> the probabilities of `predict_proba` (N, C)."""
        return (logits - self._threshold()).sigmoid() if self.multi_label_ else logits.softmax(dim=1)

    def predict(self, images: Any) -> np.ndarray:
        """Labels (N,) of pictures: ints into `class_names_`; a multi-label model gives (N, C) bool."""
        logits = self.image_logits(images)[0]
        return (logits >= self._threshold()).numpy() if self.multi_label_ else logits.argmax(dim=1).numpy()

    def _threshold(self) -> float:
        if self.threshold_ is None:
            raise ClipadaptError(
                f"This {self.card.key} had no picture to choose a threshold on: fit it with a support or val set, or "
                "set threshold_ to the score from which on a class counts as shown."
            )
        return self.threshold_

    def score(self, data: Dataset | MultiLabelDataset) -> float:
        """Top-1 accuracy in [0, 1] on labelled pictures; classes are matched by name.

        Of a multi-label model it is the mean average precision (mAP) over the classes that are shown at all.
        """
        if len(data) == 0:
            raise ClipadaptError("score needs at least one labelled picture.")
        names = self._fitted("class_names_")
        unknown = [name for name in data.class_names if name not in names]
        if unknown:
            raise unknown_name("class of this model", unknown[0], names)
        place = [names.index(name) for name in data.class_names]
        if self.multi_label_:
            targets = np.zeros((len(data), len(names)), dtype=bool)
            for row, label in zip(targets, data.labels, strict=True):
                row[[place[c] for c in data.classes_of(label)]] = True  # type: ignore[arg-type]
            if not targets.any():
                raise ClipadaptError("score needs at least one picture that shows a class.")
            return mean_average_precision(targets, self.image_logits(data)[0])
        if isinstance(data, MultiLabelDataset):
            raise ClipadaptError(f"This {self.card.key} gives each picture one class, and these can show several.")
        labels = np.array([place[label] for label in data.labels])
        return float((self.predict(data) == labels).mean())

    def _fitted(self, name: str) -> Any:
        if not hasattr(self, name):
            raise ClipadaptError(f"This {self.card.key} is not fitted yet: call fit or fit_features first.")
        return getattr(self, name)

    # -- keeping ----------------------------------------------------------------------------------------------------

    @property
    def trained_parameters(self) -> int:
        """How many numbers gradient descent or a closed-form solver chose; 0 where a cache or names suffice."""
        return 0

    def save(self, folder: str | Path) -> Path:
        """Write this fitted method as a small folder: config.json and safetensors, replaced as a whole."""
        from clipadapt.methods.artifact import save

        return save(self, folder)

    def _restore(self, backbone: Backbone | None) -> None:
        """After loading: rebuild what was not saved. Weight methods put their weights into a copy of `backbone`."""
        self.backbone_ = backbone


@dataclass(kw_only=True)
class FeatureMethod(Method):
    """A method that sees only tensors: write `_fit(support)` and `_logits(images)`."""

    def _fit_towers(
        self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run, unlabelled: Any = None
    ) -> None:
        self._learn(
            encode_images(backbone, support).features,
            label_array(support),
            encode_classes(backbone, support.class_names, self.templates),
            backbone.logit_scale,
            (encode_images(backbone, val).features, label_array(val)) if val is not None else None,
            encode_images(backbone, unlabelled).features if unlabelled is not None else None,
            run,
        )

    def fit_features(
        self,
        image_features: Array,
        labels: Any,
        text_features: Array,
        logit_scale: float = 100.0,
        *,
        unlabelled: Array | None = None,
        val: tuple[Array, Any] | None = None,
        report: Report | None = None,
    ) -> Self:
        """Learn from (N, D) image features, (N,) int labels and (C, D) text features; no backbone is needed.

        Features are torch or numpy, unit or not. `unlabelled` (U, D) are features of pictures without labels, for
        methods whose card has it (with no labelled picture, N is 0). `val` is (features, labels) for choosing
        hyper-parameters. Labels (N, C) bool make a multi-label model (see `fit`).
        """
        self.backbone_, self.origin_ = None, None
        self.class_names_ = [str(c) for c in range(len(text_features))]
        self._start(np.ndim(labels) == 2)
        self._learn(image_features, labels, text_features, float(logit_scale), val, unlabelled, Run(report))
        if self.multi_label_:
            images, targets = (image_features, labels) if val is None else val
            self._choose_threshold(np.asarray(targets), torch.as_tensor(self.logits(images)) if len(images) else None)
        return self

    def _learn(
        self,
        image_features: Array,
        labels: Any,
        text_features: Array,
        logit_scale: float,
        val: tuple[Array, Any] | None,
        unlabelled: Array | None,
        run: Run,
    ) -> None:
        texts = unit(text_features, "text_features")
        images = unit(image_features, "image_features", dim=texts.shape[1])
        if unlabelled is not None:
            unlabelled = unit(unlabelled, "unlabelled features", dim=texts.shape[1])
        self._check_signal(len(images), 0 if unlabelled is None else len(unlabelled))
        if val is not None:
            x, y = unit(val[0], "val features", dim=texts.shape[1]), val[1]
            val = x, as_labels(y, len(x), len(texts), self.multi_label_)
        self.dim_ = texts.shape[1]
        labels = as_labels(labels, len(images), len(texts), self.multi_label_)
        self._fit(Support(images, labels, texts, logit_scale, val, unlabelled), run)

    def _fit(self, support: Support, run: Run) -> None:
        raise NotImplementedError


class WeightMethod(Method):
    """A method that changes weights: `fit` leaves `backbone_`, an adapted copy, and the classifier `weight_` on it.

    `changed()` is what a wrapper (interpolation, averaging) works on and what `save` keeps, unless a method keeps
    something smaller and overrides `_restore`.
    """

    # Whether the classifier is encoded by the adapted text tower, or is itself a trained parameter.
    head_from_text: ClassVar[bool] = True

    tower_: dict[str, Tensor]  # what `changed` returns, unless a method overrides it
    weight_: Tensor  # (C, D); as this class is no dataclass itself, not a hyper-parameter

    def changed(self) -> dict[str, Tensor]:
        """The adapted weights by their names in `backbone.model`; all others are those of the original."""
        return self.tower_

    def _restore(self, backbone: Backbone | None) -> None:
        assert backbone is not None  # a weight method is never fitted on features alone
        self.backbone_ = with_weights(backbone, self.changed())

    def _reclassify(self, backbone: Backbone) -> None:
        self.weight_ = self._text_classifier(backbone).cpu()

    def _text_classifier(self, backbone: Backbone) -> Tensor:
        return backbone.logit_scale * encode_classes(backbone, self.class_names_, self.templates)  # (C, D)

    def _logits(self, images: Tensor) -> Tensor:
        return images @ self.weight_.T  # (N, C)

    def export(self, folder: str | Path) -> None:
        """Write the adapted towers as a plain transformers folder that any other program can load."""
        self._fitted("backbone_").save(folder)


def with_weights(backbone: Backbone, weights: dict[str, Tensor]) -> Backbone:
    """A copy of `backbone` in which `weights`, by their names in `backbone.model`, replace its own."""
    adapted = backbone.copy()
    missing = adapted.model.load_state_dict(weights, strict=False).unexpected_keys
    if missing:
        raise ClipadaptError(f"{backbone.source} has no weight called {missing[0]!r}.")
    return adapted


def unit(features: Array, what: str, dim: int | None = None) -> Tensor:
    """Features as float32 unit rows (N, D); refuses what is not a finite matrix of the right width."""
    x = torch.as_tensor(features)
    if x.ndim != 2 or (dim is not None and x.shape[1] != dim):
        raise ClipadaptError(f"{what} must have shape (N, {dim or 'D'}), not {tuple(x.shape)}.")
    x = x.float()
    if not torch.isfinite(x).all():
        raise ClipadaptError(f"{what} hold values that are not finite.")
    return normalize(x, dim=1)


def label_array(data: Dataset | MultiLabelDataset) -> np.ndarray:
    """The labels of N pictures: (N,) int64, or (N, C) bool where a picture can show several classes."""
    return data.targets if isinstance(data, MultiLabelDataset) else np.array(data.labels, dtype=np.int64)


def as_labels(labels: Any, n: int, classes: int, multi_label: bool = False) -> Tensor:
    """Labels as int64 (n,), each in [0, classes); with `multi_label` bool (n, classes)."""
    y = torch.as_tensor(np.asarray(labels))
    if multi_label:
        if y.shape != (n, classes) or ((y != 0) & (y != 1)).any():
            raise ClipadaptError(f"labels must be true or false with shape ({n}, {classes}), not {tuple(y.shape)}.")
        return y.bool()
    if y.shape != (n,):
        raise ClipadaptError(f"labels must have shape ({n},), one for each picture, not {tuple(y.shape)}.")
    if n and (y.is_floating_point() or int(y.min()) < 0 or int(y.max()) >= classes):
        raise ClipadaptError(f"labels must be ints from 0 to {classes - 1}, one for each text feature.")
    return y.long()
