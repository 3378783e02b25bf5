"""ECO against a plain computation, prompt by prompt, and what follows from its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from clipadapt.backbones import Backbone, Insertion, load_backbone
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from clipadapt.training.loop import seeded
from tests.golden import assert_close
from tests.images import colours
from tests.learners import coop
from tests.tiny import tiny_clip

NAMES = ["red star", "cat", "blue house"]
WORDS = ["a", "photo", "of", "the", "large", "small", "star", "house", "dog", "cat", "red", "green"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(tiny_clip())


def contexts_of(backbone: Backbone, *lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [0.3 * torch.randn(length, backbone.width("text"), generator=generator) for length in lengths]


def learner_of(backbone: Backbone, contexts: list[Tensor]):
    """The learner of these contexts, which it holds by their lengths."""
    init = [" ".join(WORDS[k : k + len(context)]) for k, context in enumerate(contexts)]
    learner = create("eco", init=init).bind(backbone, NAMES)
    with torch.no_grad():
        for stack in learner.contexts:
            stack.copy_(torch.stack([context for context in contexts if len(context) == stack.shape[1]]))
    return learner


def plain_weights(backbone: Backbone, contexts: list[Tensor]) -> Tensor:
    """Class weights (C, D), one prompt at a time."""
    weights = []
    for name in NAMES:
        total = torch.zeros(backbone.dim)
        for context in contexts:
            ids = backbone.tokenize([" ".join(["photo"] * len(context)) + f" {name}."])
            with backbone.inserted(text=[Insertion(context, at=1)]):
                feature = backbone.encode_tokens(ids, normalize=False)[0]
            total = total + feature / feature.square().sum().sqrt()
        mean = total / len(contexts)
        weights.append(mean / mean.square().sum().sqrt())
    return torch.stack(weights)


@pytest.mark.parametrize("lengths", [(2, 2, 2), (4, 4, 5), (1, 3, 2)])
def test_figures_of_a_plain_computation(backbone, batch, lengths):
    contexts = [context.requires_grad_() for context in contexts_of(backbone, *lengths)]
    learner = learner_of(backbone, contexts)
    weights = plain_weights(backbone, contexts)
    logits = backbone.logit_scale * batch.features @ weights.T
    loss = cross_entropy(logits, batch.labels)
    ours, hits = learner.loss(batch)
    assert_close(learner.texts(), weights.detach())
    assert_close(ours, loss.detach())
    assert torch.equal(hits, logits.argmax(1) == batch.labels)
    loss.backward()
    ours.backward()
    gradients = {(len(c), c.detach().sum().item()): c.grad for c in contexts}
    found = [(len(c), c.detach().sum().item(), g) for p in learner.contexts for c, g in zip(p, p.grad, strict=True)]
    assert len(found) == len(lengths)
    for length, total, gradient in found:
        assert_close(gradient, gradients[length, total], 1e-4)


def test_one_context_is_coop(backbone, batch):
    (context,) = contexts_of(backbone, 4)
    eco, plain = learner_of(backbone, [context]), coop(backbone, NAMES, context)
    assert_close(eco.texts(), plain.texts().detach())
    eco.loss(batch)[0].backward()
    plain.loss(batch)[0].backward()
    assert_close(eco.contexts[0].grad[0], plain.context.grad)


def test_order_and_repetition_of_contexts_change_nothing(backbone):
    contexts = contexts_of(backbone, 2, 3, 2)
    texts = learner_of(backbone, contexts).texts()
    assert texts.shape == (3, backbone.dim)
    assert_close(texts.norm(dim=1), torch.ones(3))
    for others in (contexts[::-1], contexts * 2):
        assert_close(learner_of(backbone, others).texts(), texts.detach())


def test_equal_contexts_would_stay_equal(backbone, batch):
    (context,) = contexts_of(backbone, 3)
    learner = learner_of(backbone, [context, context])
    learner.loss(batch)[0].backward()
    gradient = learner.contexts[0].grad
    assert gradient.abs().max() > 0
    assert_close(gradient[0], gradient[1])


def test_the_budget_is_shared_and_every_start_differs(backbone):
    width = backbone.width("text")
    with seeded(1):
        learner = create("eco", n_prompts=3, n_ctx=16).bind(backbone, NAMES)
    assert [tuple(stack.shape) for stack in learner.contexts] == [(2, 5, width), (1, 6, width)]
    contexts = [context[:5] for stack in learner.contexts for context in stack]
    assert all((a - b).abs().max() > 0.01 for i, a in enumerate(contexts) for b in contexts[:i])
    model = create("eco", n_prompts=4, n_ctx=12, epochs=1).fit(backbone, colours(1, seed=1))
    assert model.trained_parameters == 12 * width
    # the tower's length limits each prompt, not their sum
    create("eco", n_prompts=10, n_ctx=40).bind(backbone, NAMES)
    with pytest.raises(ClipadaptError, match="16"):
        create("eco", n_prompts=1, n_ctx=16).bind(backbone, NAMES)
    with pytest.raises(ClipadaptError, match="3 context vectors do not suffice for 4"):
        create("eco", n_prompts=4, n_ctx=3).fit(backbone, colours(1, seed=1))


def test_starting_words_must_differ(backbone):
    words = ["a photo of a", "the small", "a"]
    learner = create("eco", init=words).bind(backbone, NAMES)
    assert_close(learner.texts(), _template_mean(backbone, words))
    for wrong in ("a photo of a", [], ["a", "a"]):
        with pytest.raises(ClipadaptError, match="different words"):
            create("eco", init=wrong).fit(backbone, colours(1, seed=1))


def _template_mean(backbone: Backbone, words: list[str]) -> Tensor:
    with torch.no_grad():
        features = [backbone.encode_texts([f"{start} {name}." for name in NAMES]) for start in words]
    return normalize(torch.stack(features).mean(0), dim=-1)


def test_new_classes_get_the_same_contexts(backbone):
    model = create("eco", n_prompts=2, n_ctx=4, epochs=2).fit(backbone, colours(2, seed=1))
    other = model.with_classes(NAMES)
    contexts = list(other._bound.contexts[0].detach())
    assert_close(other._texts, plain_weights(backbone, contexts).detach())
