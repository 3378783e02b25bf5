"""SuS-X: a cache of images that a generator or a search finds for the class names; besides their cosines to a query,
it compares how query and cached images relate to the texts of all classes (TIP-X).

    logits = s x T' + alpha exp(-beta (1 - x K')) Y - gamma c KL(p(x) | p(K)) Y
    p(z) = softmax(z T' / temperature)

K are the support images' features, Y their labels, one-hot; c brings the divergences to the range of the cosines.
Udandarao et al., "SuS-X: Training-Free Name-Only Transfer of Vision-Language Models" (arXiv 2211.16198). Of the paper
the abstract was read; formulas, temperature, grid (alpha outermost, then beta, gamma; ties
go to the first) and how support sets come about (`clipadapt.sources.images`) are those of the official repository
vishaal27/SuS-X. With labelled images, this is TIP-X few-shot; alpha and beta of a fit without `val` are
Tip-Adapter's, gamma is ours.

Departures. The official code maps the divergences to the range of the cosines by the least and largest value of the
whole matrix of queries, so that a prediction depends on the other images of the call; it counts queries behind the
last full hundred as divergence 0; and for test images it takes the range of the validation images' cosines. All
this is `scaling="official"`. Here c = (range of cosines) / (range of divergences) over the pairs of different support
images, fixed by `fit`. And where classes have unequally many images, the mean divergence of each counts as often
as classes have images on average (a class without any is taken to be as near as the mean of the others); a sum would
favour or punish a class for their number alone. Then what all classes share can be left out: the entropy of p(x), and
the constants of the mapping. What remains is linear in p(x), so that no query is compared with a support image:

    - gamma c n sum_s p_s(x) (H_cs - mean_c H_cs)        H_c = - mean of log p(K) over class c, n images a class
"""

from typing import Any

from torch import Tensor

from clipadapt.errors import ClipadaptError
from clipadapt.methods import Classifier, Run, Support, TrainingData, hyper, method
from clipadapt.methods.kinds.caches import CacheMethod
from clipadapt.nn.signatures import common_range, divergence_classifier, log_signature, official_logits
from clipadapt.sources.images import support_of
from clipadapt.training.cache_search import best_signature_cache

BATCH = 100  # the official code's, which leaves its remainder out


@method(
    "sus-x",
    title="SuS-X: Training-Free Name-Only Transfer of Vision-Language Models",
    arxiv="2211.16198",
)
class SusX(CacheMethod, Classifier):
    """TIP-X on labelled images, or on those that `source` has of the class names; what is searched needs `val`.

    `source` is what `clipadapt.sources.images.as_image_source` takes: a data set, a folder of classes, "playground",
    or a source such as `Retrieved` and `Generated`. With it `fit(backbone, class_names=[...])` suffices; labelled
    images are added to its own. A saved model keeps its name, not its images.

    >>> model = create("sus-x").fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    alpha: float = hyper(
        1.0, "weight of the cache against zero-shot, >= 0 (Tip-Adapter; official range: 0.1-50)", low=0
    )
    beta: float = hyper(5.5, "sharpness of the affinities, >= 0 (Tip-Adapter; official range: 1-50)", low=0)
    gamma: float = hyper(1.0, "weight of the divergences, >= 0; 0 is Tip-Adapter (official range: 0.1-30)", low=0)
    temperature: float = hyper(0.5, "of signatures, divides cosines, > 0 (official)", low=1e-3)
    scaling: str = hyper("support", "where the range of divergences is taken from", choices=("support", "official"))
    source: Any = hyper(None, 'support images: a data set, a folder of classes, "playground", a source, or None')
    per_class: int = hyper(16, "images of each class that a source makes", low=1)
    seed: int = hyper(1, "of the images that a source makes")

    search_space = {"alpha": (1.0, 5.0, 20.0), "beta": (5.5, 20.0), "gamma": (0.1, 1.0, 5.0, 20.0)}

    @property
    def _signal(self) -> str:
        return super()._signal if self.source is None else "none"

    def _prepare(self, model: Any, data: TrainingData) -> TrainingData:
        if self.source is None:
            return data
        return data.with_more(support_of(self.source, model, data.class_names or [], self.per_class, self.seed))

    def _fit(self, support: Support, run: Run) -> None:
        if len(support.images) == 0:  # of fit_features: there is no backbone for a source
            raise ClipadaptError("sus-x: a source needs fit(backbone, ...); fit_features needs labelled features.")
        self.weight_ = support.logit_scale * support.texts  # (C, D)
        self.keys_, self.values_ = support.images, support.one_hot  # (N, D), (N, C)
        self.texts_ = support.texts
        keys = log_signature(support.images, support.texts, self.temperature)  # (N, C)
        self.signatures_, self.range_ = keys, None
        if self.scaling == "support":
            scale = common_range(keys, [(1.0, self.keys_, self.keys_)])
            self.signatures_ = scale * divergence_classifier(keys, self.values_)  # (C, C)
        self.alpha_, self.beta_, self.gamma_ = self.alpha, self.beta, self.gamma
        if support.val is not None:
            x, y = support.val
            affinity = x @ self.keys_.T
            if self.scaling == "official":
                self.range_ = [float(affinity.min()), float(affinity.max())]
            best = best_signature_cache(x @ self.weight_.T, [affinity], self.values_, [self._kl_logits(x)], y)
            self.alpha_, self.beta_, self.gamma_ = best[:3]

    def _kl_logits(self, images: Tensor) -> Tensor:
        signatures = log_signature(images, self.texts_, self.temperature)  # (M, C)
        if self.scaling == "support":
            return (signatures.exp() @ self.signatures_).to(images.dtype)
        affinity = images @ self.keys_.T  # (M, N)
        return official_logits(signatures, self.signatures_, self.values_, affinity, BATCH, self.range_)

    def _logits(self, images: Tensor) -> Tensor:
        return super()._logits(images) + self.gamma_ * self._kl_logits(images)  # (M, C)
