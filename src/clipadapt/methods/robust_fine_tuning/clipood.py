"""CLIPood: the image tower learns against fixed class texts with margins, and is averaged along its whole way.

    loss    = CE(s (x T' + margin (1 - T_y T')), y)        classes whose texts differ more must be told apart by more
    weights = sum_t a_t theta_t / sum_t a_t                a_t: density of Beta(beta, beta) over the run, t = 0 is CLIP

Shu et al., "CLIPood: Generalizing CLIP to Out-of-Distributions" (arXiv 2302.00864). Of the paper only the abstract was
available; details are those of the official repository thuml/CLIPood: margin 0.3, beta 0.5 for domain shift and 0.1 for
open classes with 16 shots, AdamW 5e-6 (1e-5 on larger sets) with weight decay 0.1, cosine without warm-up, batch 36,
CLIP's own logit scale, towers in evaluation mode, crops of 70-100 % of the area. It subtracts margin T_y from x, which
makes the same softmax. Departures: epochs are passes over the support set (official: 500 to 10,000 steps, with 16
shots mostly 20 to 60 passes), and a batch is drawn from all domains together (official: evenly from each).
"""

from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone
from clipadapt.methods import Classifier, FineTuningMethod, TrainingData, hyper, method
from clipadapt.methods.kinds.weights import Outputs, tower_weights
from clipadapt.nn.updates import Full
from clipadapt.training.averages import Average


def margin_logits(images: Tensor, texts: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Cosines (B, C) of unit images (B, D) and texts (C, D), raised by margin times the label's text distance."""
    return images @ texts.T + margin * (1 - texts[labels] @ texts.T)


@method(
    "clipood",
    title="CLIPood: Generalizing CLIP to Out-of-Distributions",
    arxiv="2302.00864",
    problem="classification under domain shift and with open classes",
    trains="image tower",
    new_classes=True,
)
class Clipood(FineTuningMethod, Classifier):
    """Image tower tuned by margin metric softmax, then averaged from zero-shot to the end by Beta weights.

    >>> model = create("clipood", epochs=1).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    lr: float = hyper(5e-6, "AdamW learning rate (official; 1e-5 on larger sets)", low=0)
    epochs: int = hyper(20, "passes over the support set", low=1)
    batch_size: int = hyper(36, "images a step (official)", low=1)
    min_scale: float = hyper(0.7, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)
    margin: float = hyper(0.3, "lambda, per unit of text distance (official); 0 is plain cross-entropy", low=0)
    beta: float | None = hyper(0.5, "of the average (official; 0.1 for open classes); None: no average", low=0.01)

    against, clip_norm, warmup = "frozen", None, 0.0

    def _update(self, towers: Backbone, data: TrainingData) -> Full:
        return Full(towers.model, tower_weights(towers, "vision"))

    def _objective(self, out: Outputs) -> Tensor:
        logits = margin_logits(out["image"], out["classes"], out["labels"], self.margin)
        return cross_entropy(out["scale"] * logits, out["labels"])

    def _average(self, parameters: list[Tensor], steps: int) -> Average | None:
        return None if self.beta is None else Average.beta(parameters, self.beta, steps)
