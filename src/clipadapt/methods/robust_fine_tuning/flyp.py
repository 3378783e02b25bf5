"""FLYP: fine-tune as CLIP was pre-trained, with the contrastive loss between images and captions of their classes.

    loss = (CE(s I T', 1..B) + CE(s T I', 1..B)) / 2        T_i is the text of a caption of image i's class

Both towers and the logit scale are trained; the classifier is what the trained text tower makes of the class names.

Goyal et al., "Finetune like you pretrain: Improved finetuning of zero-shot vision models" (arXiv 2212.00638). The text
of the paper was not available; details are those of the official repository locuslab/FLYP: a template is drawn for each
image, captions of one class in a batch count as each other's negatives, AdamW 1e-5 with weight decay 0.1 on all
parameters, cosine, no gradient clipping, no warm-up for few shots (500 steps elsewhere; its issue #13), 10 epochs on
ImageNet and 20 for few shots, crops of 90-100 % of the area. Its loss function also has a form that is told the labels
(`ground_labels`), in which captions of one class share the target. Departure: batches of at most 64 images (official:
512, and 256 for few shots).
"""

from torch import Tensor

from clipadapt.backbones import Backbone
from clipadapt.losses.contrastive import info_nce
from clipadapt.losses.mpm_nce import mpm_nce
from clipadapt.methods import Classifier, FineTuningMethod, TrainingData, hyper, method
from clipadapt.methods.kinds.weights import Outputs, tower_weights
from clipadapt.nn.updates import Full


@method(
    "flyp",
    title="Finetune like you pretrain: Improved finetuning of zero-shot vision models",
    arxiv="2212.00638",
    problem="classification",
    trains="both towers and the logit scale",
    new_classes=True,
)
class Flyp(FineTuningMethod, Classifier):
    """Contrastive fine-tuning of both towers with captions of the classes, as in pre-training.

    >>> model = create("flyp", epochs=1).fit(backbone, support)
    >>> model.with_classes(["red", "dog"]).predict_proba(queries).shape
    (8, 2)
    """

    epochs: int = hyper(20, "passes over the support set (official, few shots)", low=1)
    ground_labels: bool = hyper(False, "captions of one class share the target, instead of being negatives (official)")

    search_space = {"lr": (1e-6, 1e-5, 1e-4)}
    against, clip_norm, warmup = "captions", None, 0.0

    def _update(self, towers: Backbone, data: TrainingData) -> Full:
        return Full(towers.model, [*tower_weights(towers, "both"), "logit_scale"])

    def _scale(self, towers: Backbone) -> Tensor:
        return towers.model.logit_scale.exp()

    def _objective(self, out: Outputs) -> Tensor:
        if self.ground_labels:
            return mpm_nce(out["image"], out["text"], out["labels"], out["scale"])
        return info_nce(out["image"], out["text"], out["scale"])
