"""What bounds the error of few-shot adaptation: measured error against shots, domain gap and capacity.

Liu et al., "Few-shot Adaptation of Multi-modal Foundation Models: A Survey" (arXiv 2401.01736): methods fall into
prompts, adapters and external knowledge; a bound on the error on the target data has terms for the gap between the
domains, the capacity of what is trained, and the number of samples. Only the abstract was available, so the bound's
terms are approximated:

    error      1 - accuracy on the test part
    shots      labelled images of a class
    gap        distance of the data's images from those that represent the pre-training, in the backbone's features
               (`proxy_a_distance`; or `mean_distance`, which keeps growing once a linear classifier makes no errors)
    capacity   numbers that were trained

Each factor is looked at where nothing else changes: shots along the curve of one method on one data set and backbone,
the gap over data sets for one method and number of shots on one backbone, capacity over methods for one data set,
backbone and number of shots. In each such block the rank correlation (Spearman) with the error is taken, and averaged
over the blocks. A correlation over a handful of data sets or methods is weak evidence, and does not show a cause.

    clipadapt bench survey --out survey
    python -m clipadapt.evaluation.studies.survey survey/results.jsonl
"""

from __future__ import annotations

import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from clipadapt.backbones import load_backbone
from clipadapt.data.definitions.definition import definition, load
from clipadapt.data.playground.drawing import TRAIN_KINDS, TRAIN_STYLES, Playground
from clipadapt.evaluation.bench.run import read_rows
from clipadapt.evaluation.statistics import bootstrap_interval
from clipadapt.features import encode_images

Row = Mapping[str, Any]
Gaps = Mapping[tuple[str, str], float]  # (data, backbone) -> gap


@dataclass(frozen=True)
class Factor:
    """How a factor goes with the error.

    Attributes:
        name: "shots", "gap" or "capacity".
        correlation: mean rank correlation over the blocks, in [-1, 1]; NaN without a block.
        interval: 95 % bootstrap interval of that mean, over the blocks.
        blocks: how many there are; `points` of them together.
    """

    name: str
    correlation: float
    interval: tuple[float, float]
    blocks: int
    points: int


def mean_distance(source: Tensor, target: Tensor) -> float:
    """Distance of the means of unit features (N, D) and (M, D), in [0, 2]: the mean discrepancy of a linear kernel."""
    return float((source.double().mean(0) - target.double().mean(0)).norm())


def proxy_a_distance(source: Tensor, target: Tensor, seed: int = 0) -> float:
    """2 (1 - 2 e) in [0, 2], e the error of telling features (N, D) from (M, D) on halves that were not learned from.

    Ben-David et al., "Analysis of Representations for Domain Adaptation" (NeurIPS 2006). Both parts count the same,
    regardless of their sizes; 0 if a linear classifier is at chance, 2 if it makes no errors.
    """
    rng = np.random.default_rng(seed)
    parts = [x[rng.permutation(len(x))].numpy() for x in (source, target)]
    halves = [(x[: len(x) // 2], x[len(x) // 2 :]) for x in parts]
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=500)
    model.fit(np.concatenate([h[0] for h in halves]), np.repeat([0, 1], [len(h[0]) for h in halves]))
    error = fmean(float((model.predict(h[1]) != side).mean()) for side, h in enumerate(halves))
    return 2 * (1 - 2 * min(error, 0.5))


MEASURES = {"proxy-a": proxy_a_distance, "mean": mean_distance}


def domain_gaps(
    rows: Iterable[Row],
    *,
    root: Path | None = None,
    reference: str | None = None,
    measure: str = "proxy-a",
    most: int = 1000,
) -> dict[tuple[str, str], float]:
    """The gap of each (data, backbone) of `rows` whose backbone is a model, not published features.

    Args:
        root: the folder of the data sets.
        reference: the definition whose training part represents the pre-training; by default the playground's drawings
            of the kinds and styles that the embedded model learned from, which fit this model alone.
        measure: a key of `MEASURES`.
        most: at most this many training images per side, evenly strided.
    """
    found = {}
    for data, source in dict.fromkeys((row["data"], row["backbone"]) for row in rows if not row["published"]):
        backbone = load_backbone(source)
        if reference is None:
            known: Any = Playground(kinds=TRAIN_KINDS, styles=TRAIN_STYLES, seed=4).dataset(10)
        else:
            known = load(definition(reference), root).split.train
        features = []
        for images in (known, load(data, root).split.train):
            every = max(1, math.ceil(len(images) / most))
            features.append(encode_images(backbone, images.select(range(0, len(images), every))).features)
        found[data, source] = MEASURES[measure](*features)
    return found


def factors(rows: Iterable[Row], gaps: Gaps | None = None) -> list[Factor]:
    """The rank correlation of each factor with the error, from rows of the few-shot protocol; seeds are averaged.

    Blocks in which the error or the factor is the same everywhere say nothing and are left out, such as the shots of a
    method that learns from no labels.
    """
    errors: dict[tuple[str, str, int, str], list[float]] = defaultdict(list)
    capacity: dict[tuple[str, str, int, str], float] = {}
    for row in rows:
        if row.get("protocol") == "few-shot" and "accuracy" in row.get("figures", {}):
            key = (row["data"], row["backbone"], int(row["options"]["shots"]), row["label"])
            errors[key].append(1 - row["figures"]["accuracy"])
            capacity[key] = float(row["trained_parameters"])
    blocks: dict[str, dict[Any, list[tuple[float, float]]]] = {name: defaultdict(list) for name in _NAMES}
    for key, values in errors.items():
        data, backbone, shots, label = key
        error = fmean(values)
        blocks["shots"][data, backbone, label].append((shots, error))
        if gaps and (data, backbone) in gaps:
            blocks["gap"][backbone, shots, label].append((gaps[data, backbone], error))
        blocks["capacity"][data, backbone, shots].append((capacity[key], error))
    return [_factor(name, blocks[name].values()) for name in _NAMES]


_NAMES = ("shots", "gap", "capacity")


def _factor(name: str, blocks: Iterable[list[tuple[float, float]]]) -> Factor:
    telling = [points for points in blocks if all(len(set(side)) > 1 for side in zip(*points, strict=True))]
    if not telling:
        return Factor(name, math.nan, (math.nan, math.nan), 0, 0)
    found = [float(spearmanr(*zip(*points, strict=True)).statistic) for points in telling]
    return Factor(name, fmean(found), bootstrap_interval(found), len(found), sum(map(len, telling)))


def main(results: str | Path, *, root: str | Path | None = None, measure: str = "proxy-a") -> list[Factor]:
    """Read the results of a suite such as `survey`, measure the gaps, and print the three correlations."""
    rows = [row for row in read_rows(Path(results)) if "figures" in row]
    folder = root or os.environ.get("CLIPADAPT_DATA")
    gaps = domain_gaps(rows, root=None if folder is None else Path(folder), measure=measure)
    for (data, backbone), gap in sorted(gaps.items(), key=lambda item: item[1]):
        print(f"gap of {data} for {backbone}: {gap:.3f} ({measure})")
    found = factors(rows, gaps)
    for f in found:
        low, high = f.interval
        known = f"{f.correlation:+.2f} (95 % interval {low:+.2f} to {high:+.2f}; blocks: {f.blocks})"
        print(f"error and {f.name}: {known if f.blocks else 'no two cells to compare'}")
    return found


if __name__ == "__main__":
    main(sys.argv[1])
