"""m2-Mix: contrastive fine-tuning with hard negatives mixed from images and texts on the hypersphere.

    loss = InfoNCE + (1 / epoch) (a L_m2 + b L_v + c L_l + d L_vl)        mixing by Beta(e, e), drawn at each step

L_m2 has as negatives the points on the geodesics between the images and texts of the other pairs; L_v, L_l and L_vl
are mixup within a modality, with soft labels (`losses.geodesic`). With L_m2 alone it is the paper's m2-Mix, with all
four its m3-Mix. A pair is an image and a sentence of its class. Both towers learn; the classifier is then encoded by
the adapted text tower.

Oh et al., "Geodesic Multi-Modal Mixup for Robust Fine-Tuning" (arXiv 2203.03897). Of the paper only the abstract
could be read; formulas and settings are those of the official repository changdaeoh/multimodal-mixup: `scripts/
m2mix.sh` (a among 0.05, 0.01, 0.005 and 0.001, Beta 0.5, temperature 1 / 0.07 of its own for L_m2, the weight of all
four divided by the epoch, AdamW at 1e-5 or 7e-6 with weight decay 0.2 or 0.01, a tenth of warm-up, cosine, 9 epochs,
batch 128, no augmentation) and `scripts/m3mix.sh` (b = c = 0.05, d 0.05 to 0.2, Beta 0.5, for L_m2 0.2). There pairs
are images and captions of Flickr30k and COCO.

Departures: InfoNCE has the backbone's own logit scale, the official code 100. L_m2 is the mean of its two directions,
as in the variant for OpenCLIP of the official README; main.py has the sum, which is twice the weight. A last batch
that is smaller is kept. Mixing a row with itself, or with a row that has the same text, leaves it as it is, where the
official code divides by zero. Images of one class in a batch are negatives of one another, as captions are there.
"""

from typing import Any

import numpy as np
from torch import Tensor

from clipadapt.backbones import Backbone
from clipadapt.losses.contrastive import info_nce
from clipadapt.losses.geodesic import both_modal_mixup, lerp, multi_modal_mixup, slerp, uni_modal_mixup
from clipadapt.methods import Classifier, FineTuningMethod, TrainingData, hyper, method
from clipadapt.methods.kinds.weights import Outputs, tower_weights
from clipadapt.nn.updates import Full


def mixed(of: Any, images: Tensor, texts: Tensor, number: int, logit_scale: float) -> Tensor:
    """The weighted sum of the four losses of mixed features; `of` has the hyper-parameters of `M2Mix`.

    What is drawn depends on the seed and the `number` of the step.
    """
    draw = np.random.default_rng([of.seed, number])
    across = float(draw.beta(of.beta, of.beta))
    vision, language, both = (float(w) for w in draw.beta(of.beta_within, of.beta_within, size=3))
    mix = slerp if of.mixing == "geodesic" else lerp
    sharpness = logit_scale if of.temperature is None else 1 / of.temperature
    total = images.new_zeros(())
    if of.m2_mix:
        total = total + of.m2_mix * multi_modal_mixup(images, texts, across, sharpness, mix)
    if of.v_mix:
        total = total + of.v_mix * uni_modal_mixup(images, texts, vision, logit_scale, mix)
    if of.l_mix:
        total = total + of.l_mix * uni_modal_mixup(texts, images, language, logit_scale, mix)
    if of.vl_mix:
        total = total + of.vl_mix * both_modal_mixup(images, texts, both, logit_scale, mix)
    return total


@method(
    "m2-mix",
    title="Geodesic Multi-Modal Mixup for Robust Fine-Tuning",
    arxiv="2203.03897",
    problem="classification",
    trains="both towers",
    new_classes=True,
)
class M2Mix(FineTuningMethod, Classifier):
    """Both towers, fine-tuned contrastively with mixed pairs as hard negatives.

    >>> model = create("m2-mix", epochs=1).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    m2_mix: float = hyper(0.01, "weight of the mixed negatives in the loss (official: 0.001 to 0.05)", low=0)
    v_mix: float = hyper(0.0, "weight of mixup among images (official m3-Mix: 0.05)", low=0)
    l_mix: float = hyper(0.0, "weight of mixup among texts (official m3-Mix: 0.05)", low=0)
    vl_mix: float = hyper(0.0, "weight of mixup among both at once (official m3-Mix: 0.05 to 0.2)", low=0)
    beta: float = hyper(0.5, "Beta(e, e) of the mixing for m2_mix (official; 0.2 with m3-Mix)", low=1e-3)
    beta_within: float = hyper(0.5, "Beta(e, e) of the mixing for the other three (official)", low=1e-3)
    temperature: float | None = hyper(0.07, "of the mixed negatives (official); None: the backbone's own", low=1e-4)
    mixing: str = hyper("geodesic", "or linear, the paper's ablation", choices=("geodesic", "linear"))
    decay: bool = hyper(True, "divide the weights by the number of the epoch (official)")
    lr: float = hyper(1e-5, "AdamW learning rate (official)", low=0)
    epochs: int = hyper(9, "passes over the support set (official)", low=1)
    batch_size: int = hyper(128, "pairs a step (official)", low=1)
    min_scale: float = hyper(1.0, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)

    search_space = {"m2_mix": (0.01, 0.05)}
    against, weight_decay, clip_norm = "captions", 0.2, None

    def _update(self, towers: Backbone, data: TrainingData) -> Full:
        return Full(towers.model, tower_weights(towers, "both"))

    def _objective(self, out: Outputs) -> Tensor:
        share = 1 / (1 + out["epoch"]) if self.decay else 1.0
        plain = info_nce(out["image"], out["text"], out["scale"])
        return plain + share * mixed(self, out["image"], out["text"], out["number"], out["scale"])
