"""Plain fine-tuning: the whole image tower and a linear head that starts as the zero-shot classifier.

    logits = f(image; theta) h'        theta starts as CLIP's, h as s T; both are trained with cross-entropy

The end-to-end baseline of Wortsman et al., "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), section 2;
optimiser from the official repository mlfoundations/wise-ft (AdamW, weight decay 0.1, 500 warm-up steps, cosine,
gradient clipping at 1.0, 10 epochs, batch 512 at 3e-5; the authors advise 1e-5 for few shots). Departures: batches of
at most 64 images, and a warm-up of a tenth of the run, since few-shot runs are shorter than 500 steps.
"""

from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone
from clipadapt.methods import Classifier, FineTuningMethod, TrainingData, hyper, method
from clipadapt.methods.kinds.weights import Outputs, tower_weights
from clipadapt.nn.updates import Full


@method(
    "fine-tune",
    title="Robust fine-tuning of zero-shot models",
    arxiv="2109.01903",
    problem="classification",
    trains="image tower and linear head",
)
class FineTune(FineTuningMethod, Classifier):
    """All weights of the image tower and the classifier; what WiSE-FT interpolates with the zero-shot model.

    >>> model = create("fine-tune", epochs=1).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    lr: float = hyper(1e-5, "AdamW learning rate (official advice for few shots)", low=0)
    epochs: int = hyper(10, "passes over the support set (official)", low=1)

    against = "head"

    def _update(self, towers: Backbone, data: TrainingData) -> Full:
        return Full(towers.model, tower_weights(towers, "vision"))

    def _objective(self, out: Outputs) -> Tensor:
        return cross_entropy(out["image"] @ out["head"].T, out["labels"])
