"""IVLP: learned vectors in both towers, at the input and before the first blocks, independent of each other.

    t_c = text(start, v_1 .. v_n, {left words}, NAME_c, ".", end)    v replaced before blocks 1 .. J-1 by others
    x = image(patches, p_1 .. p_m)                                   p replaced likewise        min CE(s x t', y)

The baseline "independent V-L prompting" of Khattak et al., "MaPLe: Multi-modal Prompt Learning" (arXiv 2210.03117) and
of PromptSRC (arXiv 2307.06948); abstracts were read, and for every detail the official repository
muzairkhattak/multimodal-prompt-learning: 2 + 2 vectors, depth 12, the text's at the input started from "a photo" while
"of a" stays, all others from N(0, 0.02); SGD 3.5e-3, 5 epochs, batch 4, random crops (0.08-1) with flips. PromptSRC's
repository has 4 + 4 vectors, depth 9, SGD 2.5e-3 and 20 epochs, which its table reports. The depth of each tower is
min(depth, its blocks).
"""

from clipadapt.methods import Classifier, hyper, method
from clipadapt.methods.kinds.tower_prompts import TowerPromptMethod


@method(
    "ivlp",
    title="MaPLe: Multi-modal Prompt Learning",
    arxiv="2210.03117",
    trains="context vectors and tokens in the image tower",
    new_classes=True,
)
class IVLP(TowerPromptMethod, Classifier):
    """Learned vectors in both towers, independent of each other.

    >>> model = create("ivlp", epochs=1).fit(backbone, support)
    >>> model.with_classes(["red", "dog"]).predict_proba(queries).shape
    (8, 2)
    """

    n_ctx: int = hyper(2, "vectors in a text (MaPLe's baseline; 4 in PromptSRC's)", low=1)
    n_visual: int = hyper(2, "tokens in an image (MaPLe's baseline; 4 in PromptSRC's)", low=1)
    depth: int = hyper(12, "blocks with vectors of their own, in each tower at most all (PromptSRC's: 9)", low=1)
    lr: float = hyper(3.5e-3, "SGD learning rate, momentum 0.9, weight decay 5e-4 (MaPLe's baseline)", low=0)
    epochs: int | None = hyper(5, "passes over the support set (MaPLe's baseline)", low=1)
