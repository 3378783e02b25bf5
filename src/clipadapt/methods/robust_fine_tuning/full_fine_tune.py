"""Full fine-tuning with careful settings: both towers, cross-entropy over the class texts, low rates, lower below.

    loss = CE(s x T', y) + pull / 2 |theta - theta_0|^2        x, T by the towers as they are trained; s is frozen
    rate of layer l of L: lr * layer_decay^(L - l)

A recipe, not a paper. Its loss is the cross-entropy baseline ("ce_ablation") of the official repository locuslab/FLYP
(arXiv 2212.00638: AdamW 1e-5, weight decay 0.1). Rates that fall with depth are those of Dong et al., "CLIP Itself is a
Strong Fine-tuner" (2212.06138), and of EVA-CLIP (open_clip #268); the optional pull to the start is L2-SP (Li et al.,
1802.01483). A low rate and towers in evaluation mode are the advice of openai/CLIP #150, interpolation with the start
that of open_clip #282 and #740: wrap this method in `wise-ft`. Ours: the factor 0.8, the token embeddings frozen as
well as the logit scale (most of their rows no class name reads), one rate for both towers.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone
from clipadapt.methods import Classifier, FineTuningMethod, TrainingData, hyper, method
from clipadapt.methods.kinds.weights import TOWERS, Outputs, tower_weights
from clipadapt.nn.updates import Full


def layers_above(backbone: Backbone, name: str) -> int:
    """How many layers lie between a parameter, by its name in `backbone.model`, and the output of its tower.

    0 for what comes behind the blocks (last norm, pooling, projection), then the blocks from last to first, then the
    embeddings.
    """
    tower: Literal["text", "vision"] = "vision" if name.startswith(TOWERS["vision"]) else "text"
    blocks, depth = f"{backbone.tower(tower).blocks}.", len(backbone.blocks(tower))
    if name.startswith(blocks):
        return depth - int(name.removeprefix(blocks).split(".")[0])
    return depth + 1 if "embeddings." in name or "pre_layrnorm" in name else 0


@method(
    "full-fine-tune",
    title="A recipe for fine-tuning CLIP on labelled images",
    problem="classification",
    trains="both towers",
    new_classes=True,
)
class FullFineTune(FineTuningMethod, Classifier):
    """Both towers tuned with cross-entropy over class texts, gently: the recipe to start with on your own images.

    >>> model = create("full-fine-tune", epochs=1).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    tower: str = hyper("both", "which tower is tuned; text prompts stay fixed for vision", choices=("both", "vision"))
    layer_decay: float = hyper(0.8, "factor on the rate for each layer away from the output, in [0, 1]", low=0, high=1)
    pull: float = hyper(0.0, "strength of L2-SP, the pull of all weights to their start; 0 is none", low=0)

    search_space = {"lr": (1e-6, 1e-5, 1e-4)}

    def _update(self, towers: Backbone, data: TrainingData) -> Full:
        tokens = f"{towers.tower('text').tokens}."
        names = [name for name in tower_weights(towers, self.tower) if not name.startswith(tokens)]
        self._layers = [layers_above(towers, name) for name in names]
        self._learned = Full(towers.model, names)
        self._first = self._learned.tensors()
        return self._learned

    def _objective(self, out: Outputs) -> Tensor:
        loss = cross_entropy(out["scale"] * out["image"] @ out["classes"].T, out["labels"])
        for name, parameter in self._learned.by_name().items() if self.pull else ():
            loss = loss + self.pull / 2 * (parameter - self._first[name].to(parameter)).square().sum()
        return loss

    def _optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        layers: dict[int, list[Tensor]] = {}
        for layer, parameter in zip(self._layers, parameters, strict=True):
            layers.setdefault(layer, []).append(parameter)
        groups = [{"params": layers[n], "lr": self.lr * self.layer_decay**n} for n in sorted(layers)]
        return torch.optim.AdamW(groups, weight_decay=self.weight_decay)
