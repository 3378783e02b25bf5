"""What a model's accuracy hangs on: visual factors, calibration, unknown kinds, shape against surface.

The harness of Tu, Deng and Gedeon, "Toward a Holistic Evaluation of Robustness in CLIP Models" (arXiv 2410.01534), on
drawn images in which everything is known. Only the abstract was available, and there is no official code: the questions
are theirs, the images ours. Of their evaluations, retrieval, 3D and language models are not here. Their six factors of
influence are what a suite varies: architecture, data, data size and contrastive loss by `backbones`, fine-tuning by
`methods`, prompts by a method's `templates`.

The classes are those of the cell's data set, which must be the playground's, labelled by kind; no image of it is
used. A method learns `shots` plain images of each (see `data.playground_factors`), in which a kind wears its own
cloth with probability `typical`, as surfaces go with classes in photographs; 0 is the control.

    accuracy, ece, ...  on plain images like those learned
    on <factor>         accuracy where that factor alone is changed; "factors" is the mean over factors
    ece (factors)       calibration error on all of these together
    auroc               plain images against images of unknown kinds in the classes' cloths, by the largest probability
    shape bias          where shape and cloth are of different classes: decisions for the shape's class as a share of
                        decisions for either (Geirhos et al., arXiv 1811.12231); not a number if there are none
"""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import torch

from clipadapt.backbones import Backbone
from clipadapt.data import Split
from clipadapt.data.items import GeneratedItem
from clipadapt.data.playground.drawing import KINDS
from clipadapt.data.playground.factors import FACTORS, cue_conflicts, factor_images, unknown_kinds
from clipadapt.errors import DataError
from clipadapt.evaluation.protocol import Outcome, figures_of, fit
from clipadapt.evaluation.protocols.out_of_distribution import auroc, scores
from clipadapt.methods import Method
from clipadapt.metrics.calibration import confidences, expected_calibration_error

TEST_SEED = 1_000_003  # far from the seeds of cells, so that no test image is learned from


def run(
    method: Method,
    backbone: Backbone,
    split: Split,
    seed: int,
    *,
    shots: int = 16,
    pictures: int = 20,
    typical: float = 0.9,
) -> Outcome:
    """The figures that the module's docstring names.

    Args:
        shots: plain images of each kind to learn from.
        pictures: test images of each kind with each factor changed.
        typical: probability that a kind wears its own cloth where it is learned; 0 is the control.
    """
    kinds = split.test.class_names
    drawn = all(isinstance(item, GeneratedItem) for item in split.test.items)
    if not drawn or not set(kinds) <= set(KINDS):
        raise DataError(f"robustness-factors draws its own images: of the playground's kinds, not {split.test.name}.")
    model, seconds = fit(method, backbone, factor_images(kinds, shots, typical=typical, seed=seed))
    plain = factor_images(kinds, pictures, typical=typical, seed=TEST_SEED)
    known = model.image_logits(plain)[0]
    figures, classes, details = figures_of(known, plain)
    labels = np.array(plain.labels)

    changed = {
        factor: model.image_logits(factor_images(kinds, pictures, factor, typical=typical, seed=TEST_SEED))[0]
        for factor in FACTORS
    }
    on = {factor: float((logits.argmax(1).numpy() == labels).mean()) for factor, logits in changed.items()}
    everything = torch.cat(list(changed.values()))
    error, _ = expected_calibration_error(*confidences(everything, np.tile(labels, len(changed))))
    figures |= {"factors": fmean(on.values())} | {f"on {factor}": value for factor, value in on.items()}
    figures["ece (factors)"] = error

    unknown = model.image_logits(unknown_kinds(kinds, len(plain), seed=TEST_SEED))[0]
    figures["auroc"] = auroc(scores(known, "probability"), scores(unknown, "probability"))

    conflicts, worn = cue_conflicts(kinds, pictures, seed=TEST_SEED)
    decided = model.image_logits(conflicts)[0].argmax(1).numpy()
    shape, cloth = int((decided == labels).sum()), int((decided == worn).sum())
    figures["shape bias"] = shape / (shape + cloth) if shape + cloth else math.nan
    details["cue conflicts"] = {"pictures": len(conflicts), "shape": shape, "cloth": cloth}
    return Outcome(figures, model, seconds, classes, details)
