"""R-Adapter: linear adapters in frozen towers, made robust by three self-ensembles, and merged into the weights.

    training    h(y) = y + (g / (1 - p)) s F y        g = 0 for an example with probability p: dropping
                F~ <- m F~ + (1 - m) F                after each step, with the factor s: accumulation
    at the end  W' = (I + r s~ F~) W, b' = (I + r s~ F~) b        r in [0, 1]: re-scaling towards zero-shot

y is what the output projection of attention, or the second layer of the MLP, gives in every block of both towers. The
loss is MPM-NCE (`losses.mpm_nce`) between the images of a batch and a sentence of the class of each.

Kim et al., "Efficient and Versatile Robust Fine-Tuning of Zero-shot Models" (arXiv 2408.05749). Of the paper only the
abstract could be read; formulas and settings are those of the official repository tjddus9597/R-Adapter-ECCV2024,
defaults those of its base-to-novel runs on eleven data sets with 16 shots: rank 4, s = 0.1 at the start and learned,
no biases, p = 0.2, m = 0.9 without warm-up, r = 0.5, margin 0.1, no smoothing, AdamW 5e-4 without weight decay, batch
32, 100 epochs (101 there), crops of 90-100 % of the area, gradient norm at most 1. For ImageNet it has m = 0.999,
margin 0.05 and smoothing 0.02, 50 epochs with 16 shots; with all images 10 epochs and full matrices (`rank=None`,
which are the 13 % of the parameters that the abstract speaks of); for retrieval also r = 0.8 and no smoothing.

Departures: a tenth of the run is warm-up, instead of 500 steps. Sentences come from `templates`, one of the class's
at random for each image as there, but the default is one template instead of ImageNet's 80. Dropping is by example;
the official code draws along the first axis, which in its towers is the position of a token. The official code takes
a full matrix where the rank is below the width, the low-rank form elsewhere; its merging and its README say otherwise,
and are followed.
"""

from torch import Tensor

from clipadapt.backbones import Backbone
from clipadapt.losses.contrastive import info_nce
from clipadapt.losses.mpm_nce import mpm_nce
from clipadapt.methods import Classifier, FineTuningMethod, TrainingData, hyper, method
from clipadapt.methods.kinds.weights import Outputs
from clipadapt.nn.updates import LinearAdapters
from clipadapt.training.averages import Average

START_SCALE = 0.1  # of each adapter's learned factor (official)


@method(
    "r-adapter",
    title="Efficient and Versatile Robust Fine-Tuning of Zero-shot Models",
    arxiv="2408.05749",
    problem="classification",
    trains="linear adapters in both towers",
    new_classes=True,
)
class RAdapter(FineTuningMethod, Classifier):
    """Mergeable adapters of both towers, dropped, averaged and re-scaled; learned with MPM-NCE.

    >>> model = create("r-adapter", epochs=1, rank=4).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    rank: int | None = hyper(4, "rank of an adapter (official, few shots); None: a full matrix", low=1)
    drop: float = hyper(
        0.2, "probability that an example goes past an adapter in training (official)", low=0, high=0.95
    )
    ema: float = hyper(
        0.9, "what the running mean of the adapters keeps at a step; 0: no mean (official)", low=0, high=1
    )
    scale: float = hyper(0.5, "re-scaling of the adapters at the end; 0 is zero-shot (official)", low=0, high=1)
    margin: float = hyper(0.1, "by which cosines of positives must win (official)", low=0)
    smoothing: float = hyper(0.0, "share of the soft labels that negatives have (official)", low=0, high=0.99)
    loss: str = hyper("mpm-nce", "or InfoNCE, the paper's ablation", choices=("mpm-nce", "info-nce"))
    lr: float = hyper(5e-4, "AdamW learning rate (official)", low=0)
    epochs: int = hyper(100, "passes over the support set (official)", low=1)
    batch_size: int = hyper(32, "images a step (official)", low=1)

    search_space = {"scale": (0.5, 0.8)}
    against, weight_decay = "captions", 0.0

    def _update(self, towers: Backbone, data: TrainingData) -> LinearAdapters:
        sites = towers.target_modules(kinds=("o", "fc2"))
        return LinearAdapters(towers.model, sites, self.rank, scale=START_SCALE, drop=self.drop)

    def _saved(self, model: Backbone) -> LinearAdapters:
        sites = model.target_modules(kinds=("o", "fc2"))
        return LinearAdapters.restore(self.update_, model.model, sites, self.rank)

    def _factor(self) -> float:
        return self.scale

    def _average(self, parameters: list[Tensor], steps: int) -> Average:
        return Average.running(parameters, self.ema)

    def _objective(self, out: Outputs) -> Tensor:
        if self.loss == "info-nce":
            return info_nce(out["image"], out["text"], out["scale"])
        soft = {"margin": self.margin, "smoothing": self.smoothing}
        return mpm_nce(out["image"], out["text"], out["labels"], out["scale"], **soft)
