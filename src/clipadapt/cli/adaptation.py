"""What `adapt` and `demo` do: draw pictures, compare methods, fit, save, and check on held-out pictures.

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
from typing import TYPE_CHECKING, Any

from clipadapt.cli import console
from clipadapt.cli.console import counted, err, note
from clipadapt.errors import ArtifactError, DataError
from clipadapt.files import is_model

if TYPE_CHECKING:
    from clipadapt.backbones import Backbone
    from clipadapt.data import Dataset
    from clipadapt.methods import Method

MAX_HELD_OUT = 2000  # pictures: the interval of an accuracy is then about two points to either side, or less


@dataclass(frozen=True)
class Plan:
    """What the person asked for."""

    target: Path
    shots: int = 16
    method: Method | None = None  # None: compare and choose
    backbone: str | None = None
    templates: str = "photo"
    seed: int = 1
    budget: float = 60.0  # seconds
    on_error: str = "raise"

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
        raise ArtifactError(f"{target} lies among the pictures of {photos}; save the model elsewhere (--out).")
    if target.is_dir() and any(target.iterdir()) and not is_model(target):
        raise ArtifactError(f"{target} holds other files and no clipadapt model; give a new folder (--out).")
    ancestor = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not os.access(ancestor, os.W_OK):
        raise ArtifactError(f"{target} cannot be written: no permission to write in {ancestor}.")


def draw(data: Dataset, test: Dataset | None, shots: int, seed: int) -> tuple[Dataset, Dataset]:
    """(support set, held-out pictures): shots of `data`, and up to 2,000 of `test` or else of what is left over."""
    from clipadapt.data.splits import sample_shots

    rng = random.Random(seed)
    chosen = sample_shots(data.labels, shots, rng)
    rest, source = sorted(set(range(len(data))) - set(chosen)), data
    if test is not None:
        rest, source = list(range(len(test))), test
    if len(rest) > MAX_HELD_OUT:
        rest = sorted(rng.sample(rest, MAX_HELD_OUT))
    return data.select(chosen), source.select(rest)


def describe(data: Dataset, support: Dataset, held_out: Dataset, shots: int) -> None:
    """Say what there is to learn from, and what is odd about it."""
    note(f"{data.name}: {counted(len(data), 'picture')} of {counted(len(data.class_names), 'class')}")
    note(f"learning from {counted(len(support), 'picture')}, checking on {counted(len(held_out), 'held-out picture')}")
    few = [f"{name} ({n})" for name, n in zip(support.class_names, support.counts, strict=True) if n < shots]
    if few:
        listed = ", ".join(few[:5]) + (", …" if len(few) > 5 else "")
        note(f"{counted(len(few), 'class')} with fewer than {counted(shots, 'picture')}: {listed}")
    if len(support.class_names) < 2:
        raise DataError(f"{data.name} has one class, {support.class_names[0]!r}; at least two are needed.")


def adapt_to(data: Dataset, test: Dataset | None, plan: Plan) -> dict[str, Any]:
    """Learn from few shots of `data`, save the model, check it; the document of `--json`."""
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

    fitted_at = time.perf_counter()
    unfinished = plan.target.absolute().with_name(f".{plan.target.name}-training")
    if unfinished.exists():
        note("an interrupted training is continued, where it was of these pictures and settings")
    with console.training_progress(f"Fitting {method.card.key}") as report:
        method.fit(backbone, support, report=report, resume=unfinished)
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
            "unreadable": [{"picture": name, "reason": reason} for name, reason in unreadable],
        },
        **comparison,
        "held_out": check(method, backbone, support, held_out, plan.templates),
        "seconds": time.perf_counter() - start,
    }


def encode(
    backbone: Backbone, support: Dataset, held_out: Dataset, on_error: str
) -> tuple[Dataset, Dataset, list[tuple[str, str]]]:
    """Encode all pictures under one progress bar, so that later steps find their features; drop what is unreadable."""
    from clipadapt.features import encode_images

    encoded = encode_images(backbone, [*support.items, *held_out.items], progress=True, on_error=on_error)
    for _, reason in encoded.skipped:
        note(f"skipped: {reason}")
    kept = [i for i in encoded.kept if i < len(support)], [i - len(support) for i in encoded.kept if i >= len(support)]
    return support.select(kept[0]), held_out.select(kept[1]), encoded.skipped


def note_duplicates(support: Dataset, held_out: Dataset) -> None:
    """Say how many held-out pictures are also learned from, which would flatter the result."""
    from clipadapt.data import find_duplicates

    groups = find_duplicates({"support": support, "held out": held_out})
    flattered = sum(
        sum(place.part == "held out" for place in group) for group in groups if any(p.part == "support" for p in group)
    )
    if flattered:
        note(f"{counted(flattered, 'held-out picture')} with a copy among those learned from (identical files)")


def compare(
    backbone: Backbone, support: Dataset, plan: Plan, frequencies: Sequence[float]
) -> tuple[Method, dict[str, Any]]:
    """The best method inside the support set, unfitted, and the comparison for the document."""
    from clipadapt.evaluation.select import select

    with err.status(f"Comparing methods by cross-validation, at most {plan.budget:.0f} s"):
        selection = select(
            backbone,
            support,
            budget=plan.budget,
            seed=plan.seed,
            templates=plan.templates,
            frequencies=frequencies,
            progress=note,
        )
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
    model: Method, backbone: Backbone, support: Dataset, held_out: Dataset, templates: str
) -> dict[str, Any] | None:
    """Accuracy of zero-shot and of `model` on held-out pictures; None where there are none."""
    if len(held_out) == 0:
        return None
    from clipadapt.methods import create

    zero_shot = create("zero-shot", templates=templates).fit(backbone, class_names=support.class_names)
    return {
        "pictures": len(held_out),
        "zero_shot": _measured(zero_shot.predict(held_out), held_out.labels),
        "adapted": _measured(model.predict(held_out), held_out.labels),
    }


def _measured(predicted: Any, labels: Sequence[int]) -> dict[str, Any]:
    from clipadapt.evaluation.metrics import accuracy, wilson

    correct = int((predicted == labels).sum())
    return {"accuracy": accuracy(labels, predicted), "interval": wilson(correct, len(labels))}


def settings(method: Method) -> dict[str, Any]:
    """The method's hyper-parameters as JSON values."""
    from clipadapt.methods.artifact import recipe

    return recipe(method)["hyperparameters"]
