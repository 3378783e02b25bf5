"""What `adapt` and `demo` do: draw images, compare methods, fit, save, and check on held-out images.

The outcome is one JSON document. `outcome.py` shows it, so that --json and the tables cannot disagree.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from clipadapt.cli import console
from clipadapt.cli.console import count_of, err, note, with_old_key
from clipadapt.errors import ArtifactError, DataError
from clipadapt.files import is_model

if TYPE_CHECKING:
    from clipadapt.backbones import Backbone
    from clipadapt.data import Dataset, MultiLabelDataset
    from clipadapt.methods import Classifier

MAX_HELD_OUT = 2000  # images: the interval of an accuracy is then about two points to either side, or less


@dataclass(frozen=True)
class Plan:
    """What the user asked for."""

    target: Path
    shots: int = 16
    method: Classifier | None = None  # None: compare and choose
    backbone: str | None = None
    templates: str = "photo"
    seed: int = 1
    budget: float = 60.0  # seconds
    on_error: str = "raise"
    unlabelled: Path | None = None

    @property
    def source(self) -> str | None:
        """The backbone's source; a path is made absolute, for the saved model must find it from any other folder."""
        local = self.backbone is not None and Path(self.backbone).exists()
        return str(Path(self.backbone).resolve()) if local else self.backbone  # type: ignore[arg-type]


def check_target(target: Path, photos: Path | None = None) -> None:
    """Refuse, before any work is done, a folder that the model must not or cannot be saved in."""
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{target} is a file; the model needs a folder.")
    if photos is not None and photos.is_dir() and target.resolve().is_relative_to(photos.resolve()):
        raise ArtifactError(f"{target} is inside the image folder {photos}; save the model elsewhere (--out).")
    if target.is_dir() and any(target.iterdir()) and not is_model(target):
        raise ArtifactError(f"{target} holds other files and is not a clipadapt model; give a new folder (--out).")
    ancestor = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not os.access(ancestor, os.W_OK):
        raise ArtifactError(f"{target} cannot be written: no permission to write in {ancestor}.")


D = TypeVar("D", "Dataset", "MultiLabelDataset")


def draw(data: D, test: D | None, shots: int, seed: int) -> tuple[D, D]:
    """(support set, held-out images): shots of `data`, and up to 2,000 of `test` or else of what is left over."""
    from clipadapt.data import MultiLabelDataset
    from clipadapt.data.splits import sample_shots

    rng = random.Random(seed)
    if isinstance(data, MultiLabelDataset):
        chosen = data.few_shot_indices(shots, seed)
    else:
        chosen = sample_shots(data.labels, shots, rng)
    rest, source = sorted(set(range(len(data))) - set(chosen)), data
    if test is not None:
        rest, source = list(range(len(test))), test
    if len(rest) > MAX_HELD_OUT:
        rest = sorted(rng.sample(rest, MAX_HELD_OUT))
    return data.select(chosen), source.select(rest)


def describe(data: D, support: D, held_out: D, shots: int) -> None:
    """Say what there is to learn from, and warn about classes with few images."""
    note(f"{data.name}: {count_of(len(data), 'image')} of {count_of(len(data.class_names), 'class')}")
    note(f"learning from {count_of(len(support), 'image')}, checking on {count_of(len(held_out), 'held-out image')}")
    few = [f"{name} ({n})" for name, n in zip(support.class_names, support.counts, strict=True) if n < shots]
    if few:
        listed = ", ".join(few[:5]) + (", …" if len(few) > 5 else "")
        note(f"{count_of(len(few), 'class')} with fewer than {count_of(shots, 'image')}: {listed}")
    if len(support.class_names) < 2:
        raise DataError(f"{data.name} has one class, {support.class_names[0]!r}; at least two are needed.")


def adapt_to(data: Any, test: Any, plan: Plan) -> dict[str, Any]:
    """Learn from few shots of `data`, save the model, check it (on part of `test`, if given); the document of `--json`.

    Both are a `Dataset`, or `data` is a `MultiLabelDataset`.
    """
    start = time.perf_counter()
    support, held_out = draw(data, test, plan.shots, plan.seed)
    describe(data, support, held_out, plan.shots)
    from clipadapt.data import class_texts

    class_texts(support.class_names, plan.templates)  # a wrong template shows now, not after the encoding
    with err.status(f"Loading {plan.backbone or 'the embedded model'}"):
        from clipadapt.backbones import load_backbone

        backbone = load_backbone(plan.source)
    support, held_out, unreadable = encode(backbone, support, held_out, plan.on_error)
    note_duplicates(support, held_out)
    comparison: dict[str, Any] = {"trials": [], "not_tried": [], "reason": None}
    method = plan.method
    if method is None:
        method, comparison = compare(backbone, support, plan, data.counts)

    more = read_unlabelled(plan.unlabelled)
    fitted_at = time.perf_counter()
    unfinished = plan.target.absolute().with_name(f".{plan.target.name}-training")
    if unfinished.exists():
        note("an interrupted training run is resumed if it used these images and settings")
    with console.training_progress(f"Fitting {method.card.key}") as report:
        method.fit(backbone, support, unlabelled=more, report=report, resume=unfinished)
    shutil.rmtree(unfinished, ignore_errors=True)
    fit_seconds = time.perf_counter() - fitted_at
    folder = method.save(plan.target)
    return {
        "model": str(folder),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "method": method.card.key,
        "hyperparameters": settings(method),
        "trained_parameters": method.trained_parameters,
        "fit_seconds": fit_seconds,
        "backbone": {"source": backbone.source, "fingerprint": backbone.fingerprint},
        "data": {
            "name": data.name,
            "classes": len(support.class_names),
            "support": len(support),
            "shots": plan.shots,
            "seed": plan.seed,
            "multi_label": method.multi_label_,
            "unreadable": [{**with_old_key("image", name), "reason": reason} for name, reason in unreadable],
        },
        **comparison,
        "held_out": check(method, backbone, support, held_out, plan.templates),
        "seconds": time.perf_counter() - start,
    }


def read_unlabelled(folder: Path | None) -> list[str] | None:
    """The images anywhere under `folder`."""
    from clipadapt.data import image_files

    if folder is None:
        return None
    files = image_files(folder)
    if not files:
        raise DataError(f"{folder} holds no images.")
    note(f"{count_of(len(files), 'unlabelled image')} in {folder}")
    return files


def encode(backbone: Backbone, support: D, held_out: D, on_error: str) -> tuple[D, D, list[tuple[str, str]]]:
    """Encode all images under one progress bar, so that later steps find their features; drop unreadable ones."""
    from clipadapt.features import encode_images

    encoded = encode_images(backbone, [*support.items, *held_out.items], progress=True, on_error=on_error)
    for _, reason in encoded.skipped:
        note(f"skipped: {reason}")
    kept = [i for i in encoded.kept if i < len(support)], [i - len(support) for i in encoded.kept if i >= len(support)]
    return support.select(kept[0]), held_out.select(kept[1]), encoded.skipped


def note_duplicates(support: D, held_out: D) -> None:
    """Say how many held-out images are also learned from, which would flatter the result."""
    from clipadapt.data import find_duplicates

    groups = find_duplicates({"support": support, "held out": held_out})
    flattered = sum(
        sum(place.part == "held out" for place in group) for group in groups if any(p.part == "support" for p in group)
    )
    if flattered:
        note(f"{count_of(flattered, 'held-out image')} with a copy among those learned from (identical files)")


def compare(
    backbone: Backbone, support: Dataset | MultiLabelDataset, plan: Plan, frequencies: Sequence[float]
) -> tuple[Classifier, dict[str, Any]]:
    """The best method inside the support set, unfitted, and the comparison for the document."""
    from clipadapt.evaluation.selection import select

    common: Any = {"budget": plan.budget, "seed": plan.seed, "templates": plan.templates, "progress": note}
    with err.status(f"Comparing methods by cross-validation, at most {plan.budget:.0f} s"):
        selection = select(backbone, support, frequencies=frequencies, **common)
    trials = [
        {
            "method": trial.key,
            "hyperparameters": trial.hyperparameters,
            "accuracy": trial.accuracy,
            "interval": trial.interval,
            "seconds": trial.seconds,
            "trained_parameters": trial.trained_parameters,
            "chosen": trial is selection.best,
        }
        for trial in selection.trials
    ]
    skipped = [{"method": key, "reason": reason} for key, reason in selection.skipped]
    return selection.best.create(), {"trials": trials, "not_tried": skipped, "reason": selection.reason}


def check(
    model: Classifier, backbone: Backbone, support: Dataset | MultiLabelDataset, held_out: Any, templates: str
) -> dict[str, Any] | None:
    """How good zero-shot and `model` are on held-out images; None if there are none."""
    from clipadapt.data import MultiLabelDataset
    from clipadapt.methods import create

    if len(held_out) == 0 or (isinstance(held_out, MultiLabelDataset) and not held_out.targets.any()):
        return None
    zero_shot = create("zero-shot", templates=templates).fit(backbone, support)
    measured = _measure_sets if isinstance(held_out, MultiLabelDataset) else _measure
    scores = {"zero_shot": measured(zero_shot, held_out), "adapted": measured(model, held_out)}
    return {**with_old_key("images", len(held_out)), **scores}


def _measure(model: Classifier, held_out: Dataset) -> dict[str, Any]:
    from clipadapt.metrics.classification import accuracy, wilson

    predicted = model.predict(held_out)
    correct = int((predicted == held_out.labels).sum())
    return {"accuracy": accuracy(held_out.labels, predicted), "interval": wilson(correct, len(held_out))}


def _measure_sets(model: Classifier, held_out: MultiLabelDataset) -> dict[str, Any]:
    from clipadapt.metrics.multilabel import f1_scores, mean_average_precision

    scores = model.image_logits(held_out)[0]
    f1 = f1_scores(held_out.targets, model.probabilities(scores) >= 0.5)
    return {"mAP": mean_average_precision(held_out.targets, scores), "OF1": f1.overall, "CF1": f1.per_class}


def settings(method: Classifier) -> dict[str, Any]:
    """The method's hyper-parameters as JSON values."""
    from clipadapt.methods.recipe import recipe

    return recipe(method)["hyperparameters"]
