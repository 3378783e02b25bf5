"""Ten lines for each way to learn that no shipped method has yet; importing this module registers them for tests.

Each is the skeleton of a published method, to prove that the base carries it: all conformance tests of their tasks run
over these, too, and `test_kinds.py` tests what is particular to them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import normalize

from clipadapt.backbones import LongerPositions
from clipadapt.data import Dataset, as_items
from clipadapt.features import encode_classes, encode_images
from clipadapt.methods import Classifier, FeatureMethod, PromptMethod, hyper, method
from clipadapt.methods.kinds.contexts import ContextLearner
from clipadapt.methods.kinds.pretraining import Pretraining
from clipadapt.methods.kinds.test_time import TestTimeMethod
from clipadapt.methods.tasks.retrieval import Retriever


@method("test-tpt", title="Test-Time Prompt Tuning", arxiv="2209.07511", family="tests", new_classes=True)
class Tpt(TestTimeMethod, PromptMethod, Classifier):
    """The context that makes the views of one image agree."""

    n_ctx: int = hyper(4, "context vectors", low=1)
    init: str | None = hyper("a photo of a", "words to start from")
    views: int = hyper(3, "views of an image, the plain one included", low=1)
    updates: int = hyper(1, "steps for an image", low=0)
    lr: float = hyper(5e-3, "AdamW learning rate", low=0)

    learner = ContextLearner

    def _adapted(self, views):
        learner, optimizer = self._bound, torch.optim.AdamW(self._bound.parameters(), lr=self.lr)
        with torch.no_grad():
            seen = learner.images(views)  # (V, D)
        with torch.enable_grad():
            for _ in range(self.updates):
                mean = learner.logits(seen, learner.texts()).softmax(1).mean(0)  # (C,)
                optimizer.zero_grad()
                (-mean @ mean.log()).backward()
                optimizer.step()
        return learner.logits(seen[:1], learner.texts())[0]


@method(
    "test-upl", title="Unsupervised Prompt Learning", arxiv="2204.03649", family="tests", trains="a context",
    signal="unlabelled", unlabelled=True, new_classes=True,
)  # fmt: skip
class Upl(PromptMethod, Classifier):
    """A context learned from the images of which zero-shot is surest."""

    n_ctx: int = hyper(4, "context vectors", low=1)
    init: str | None = hyper("a photo of a", "words to start from")
    surest: int = hyper(4, "images of a class", low=1)

    learner = ContextLearner

    def _prepare(self, model, data):
        texts = encode_classes(model, data.class_names, self.templates)
        features = encode_images(model, data.unlabelled).features  # (U, D)
        surety, labels = (model.logit_scale * features @ texts.T).softmax(1).max(1)
        of_class = [surety.where(labels == c, -1).topk(min(self.surest, int((labels == c).sum()))).indices
                    for c in range(len(texts))]  # fmt: skip
        chosen, items = torch.cat(of_class).sort().values.tolist(), as_items(data.unlabelled)
        support = Dataset([items[row] for row in chosen], labels[chosen].tolist(), data.class_names)
        return replace(data, support=support, unlabelled=None)


@method("test-rapf", title="Class means over time", arxiv="2407.14143", family="tests", streams=True)
class Rapf(FeatureMethod, Classifier):
    """The mean of each class's images and its text; those of earlier tasks stay as they were."""

    def _fit(self, support, run):
        self.means_ = torch.cat([vars(self).get("means_", support.texts[:0]), support.texts])[: len(support.texts)]
        seen = support.one_hot.sum(0) > 0  # (C,)
        self.means_[seen] = normalize(normalize(support.one_hot.T @ support.images, dim=1) + support.texts, dim=1)[seen]
        self.weight_ = support.logit_scale * self.means_


@method("test-long-clip", title="Long-CLIP", arxiv="2403.15378", family="tests", trains="both towers")
class LongClip(Pretraining, Retriever):
    """More positions for texts, and training on long captions."""

    batch_size: int = hyper(4, "pairs a step", low=2)
    length: int = hyper(40, "tokens of a text at most", low=17)

    def _towers(self, model):
        return model.edited(LongerPositions(self.length, keep=6))
