"""Zero-shot classification: the image goes to the class whose name it resembles most.

    logits = s * x T',   T_c = unit(mean over sentences of unit(text(sentence)))

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020), section
3.1.4: a class is a prompt template filled with its name, or the mean of several (an ensemble). Sentences that
describe a class (Menon and Vondrick, arXiv 2210.07183; Pratt et al., arXiv 2209.03320) are the same thing with other
sentences: `templates={"cat": ["a cat, which has whiskers", ...], ...}` or a .json file of that form.
"""

from clipadapt.methods import Classifier, FeatureMethod, Run, Support, method


@method(
    "zero-shot",
    title="Learning Transferable Visual Models From Natural Language Supervision",
    arxiv="2103.00020",
    problem="zero-shot classification",
    signal="none",
    new_classes=True,
    multi_label=True,
)
class ZeroShot(FeatureMethod, Classifier):
    """No learning: class texts only. Everything else is measured against it.

    >>> import torch
    >>> head = ZeroShot().fit_features(torch.empty(0, 2), [], torch.eye(2))
    >>> head.logits(torch.tensor([[0.0, 1.0]])).argmax(1)
    tensor([1])
    """

    def _fit(self, support: Support, run: Run) -> None:
        self.weight_ = support.logit_scale * support.texts  # (C, D)
