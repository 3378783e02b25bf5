"""Tip-Adapter: a key-value cache of the labelled images corrects the zero-shot classifier, without training.

    logits = s x T' + alpha * exp(-beta (1 - x K')) Y        K = support features, Y = their labels, one-hot

Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification" (arXiv 2207.09519), sections
3.1 and 4.3; grid and its order (beta outer, alpha inner, ties go to the first) from the official repository
gaopengcuhk/Tip-Adapter. Departure: the official code averages ten augmented views for each key, here a key is the
plain image; and a search needs a validation set of its own, never the test set.
"""

from clipadapt.methods import Classifier, Run, Support, hyper, method
from clipadapt.methods.kinds.caches import CacheMethod
from clipadapt.training.cache_search import best_cache


@method(
    "tip-adapter",
    title="Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification",
    arxiv="2207.09519",
)
class TipAdapter(CacheMethod, Classifier):
    """A cache of support features added to zero-shot logits; alpha and beta are searched on `val` where it is given.

    >>> model = create("tip-adapter", alpha=1.0, beta=5.5).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    alpha: float = hyper(1.0, "weight of the cache against zero-shot, >= 0 (paper: 1)", low=0)
    beta: float = hyper(5.5, "sharpness of the affinities, >= 0 (paper: 5.5)", low=0)

    search_space = {"alpha": (0.5, 1.0, 2.0, 5.0, 10.0, 20.0), "beta": (1.0, 2.0, 5.5, 10.0, 20.0, 40.0)}

    def _fit(self, support: Support, run: Run) -> None:
        self.weight_ = support.logit_scale * support.texts  # (C, D)
        self.keys_, self.values_ = support.images, support.one_hot  # (N, D), (N, C)
        self.beta_, self.alpha_ = self.beta, self.alpha
        if support.val is not None:
            x, y = support.val
            self.beta_, self.alpha_ = best_cache(x @ self.weight_.T, x @ self.keys_.T, self.values_, y)
