"""MoCoOp against a plain computation, image by image and prompt by prompt, and what follows from its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clipadapt.backbones import Backbone, Insertion, load_backbone
from clipadapt.data.templates.sets import class_texts
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_images
from clipadapt.methods import create
from clipadapt.methods.kinds.prompts import Batch
from clipadapt.methods.prompt_learning.mocoop import MixtureLearner, general_groups, guidance, routing
from clipadapt.training.loop import seeded
from tests.golden import assert_close
from tests.images import colours
from tests.learners import coop
from tests.tiny import tiny_clip

NAMES = ["red star", "cat", "blue house"]
GROUPS = [
    ["a photo of a {}.", "a photo of the {}.", "the {}"],
    ["the large {}, small.", "a large {}."],
    ["a {} of the house.", "the {}."],
    ["{} photo."],
]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(tiny_clip())


def learner_of(backbone: Backbone, groups: list[list[str]] = GROUPS, **settings) -> MixtureLearner:
    torch.manual_seed(2)
    return create("mocoop", groups=groups, **settings).bind(backbone, NAMES)


def shaken(learner: MixtureLearner) -> MixtureLearner:
    """Away from the start, where prompts equal their templates."""
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return learner


def plain_texts(backbone: Backbone, learner: MixtureLearner) -> list[list[Tensor]]:
    features = []
    for context, templates in zip(learner.contexts, learner.groups, strict=True):
        features.append([])
        for name in learner.class_names:
            ids = backbone.tokenize([templates[0].replace("{}", name)])
            start = len(backbone.tokenize([templates[0].split("{}")[0]])[0]) - 2
            length = len(backbone.tokenize([name])[0]) - 2
            rows = [*range(1, 1 + start), *range(1 + start + length, 1 + length + len(context))]
            with backbone.inserted(text=[Insertion(context, at=torch.tensor(rows))]):
                feature = backbone.encode_tokens(ids, normalize=False)[0]
            if learner.correction is not None:
                feature = feature + learner.correction
            features[-1].append(feature / feature.square().sum().sqrt())
    return features


def plain_prototypes(backbone: Backbone, learner: MixtureLearner) -> list[list[Tensor]]:
    with torch.no_grad():
        features = [
            [torch.stack([backbone.encode_texts([t.replace("{}", n)])[0] for t in templates]).mean(0) for n in NAMES]
            for templates in learner.groups
        ]
    return [[f / f.norm() for f in group] for group in features]


def log_softmax(values: list[Tensor]) -> list[Tensor]:
    total = sum(v.exp() for v in values)
    return [v - total.log() for v in values]


def plain_loss(
    backbone: Backbone, learner: MixtureLearner, images: Tensor, labels: list[int], k: int = 2
) -> tuple[Tensor, list[list[Tensor]]]:
    """The whole loss with the official weights, and the logits."""
    texts, prototypes = plain_texts(backbone, learner), plain_prototypes(backbone, learner)
    groups, classes = range(len(texts)), range(len(learner.class_names))
    logits, recognised, gate = [], 0.0, 0.0
    for image, label in zip(images, labels, strict=True):
        says = [learner.router.weight[g] @ image + learner.router.bias[g] for g in groups]
        best = sorted(groups, key=lambda g: -says[g].item())[:k]
        total = sum(says[g].exp() for g in best)
        mixed = [sum(says[g].exp() / total * texts[g][c] for g in best) for c in classes]
        logits.append([backbone.logit_scale * image @ feature for feature in mixed])
        recognised = recognised - log_softmax(logits[-1])[label] / len(images)
        similar = [float(image @ prototypes[g][label]) for g in groups]
        for g in sorted(groups, key=lambda g: -similar[g])[:k]:
            similar[g] += 10
        taught = [math.exp(s) / sum(map(math.exp, similar)) for s in similar]
        gate = gate - sum(t * s for t, s in zip(taught, log_softmax(says), strict=True)) / len(images)
    held = 0.0
    for g in groups:
        for c in classes:
            cosines = [learner.of.text_scale * texts[g][c] @ prototypes[g][e] for e in classes]
            held = held - log_softmax(cosines)[c] / (len(groups) * len(classes))
    return recognised + 5 * held + gate, logits


@pytest.mark.parametrize("settings", [{}, {"correction": True}, {"text_scale": 20.0}, {"top_k": 3}, {"top_k": 9}])
def test_figures_of_a_plain_computation(backbone, batch, settings):
    learner = shaken(learner_of(backbone, **settings))
    k = min(settings.get("top_k", 2), len(GROUPS))
    loss, logits = plain_loss(backbone, learner, batch.features, batch.labels.tolist(), k)
    ours, hits = learner.loss(batch)
    texts = torch.stack([torch.stack(group) for group in plain_texts(backbone, learner)])
    assert_close(learner.texts(), texts.detach())
    assert_close(learner.prototypes, torch.stack([torch.stack(g) for g in plain_prototypes(backbone, learner)]))
    plain = torch.stack([torch.stack(row) for row in logits]).detach()
    assert_close(learner.logits(batch.features, learner.texts()), plain)
    assert torch.equal(hits, plain.argmax(1) == batch.labels)
    assert_close(ours, loss.detach())
    parameters = list(learner.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(loss, parameters), strict=True):
        assert b.abs().max() > 0
        assert_close(a, b, 1e-4)
    assert not any(p.requires_grad for p in backbone.model.parameters())


def test_training_takes_the_steps_of_a_plain_loop(backbone):
    support = colours(2, seed=4)
    model = create("mocoop", groups=GROUPS, epochs=3, seed=6, lr=0.2, text_weight=100.0).fit(backbone, support)
    images, labels = encode_images(backbone, support).features, torch.tensor(support.labels)
    with seeded(6):
        learner = create("mocoop", groups=GROUPS, text_weight=100.0).bind(backbone, support.class_names)
    parameters = dict(learner.named_parameters())
    speed = {name: torch.zeros_like(p) for name, p in parameters.items()}
    cut = 0
    for lr in (1e-5, 0.2, 0.2 * 0.5 * (1 + math.cos(math.pi / 3))):
        loss = learner.loss(Batch(torch.arange(8), labels, images, None))[0]
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        cut += norm > 1
        for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
            speed[name] = 0.9 * speed[name] + gradient / max(norm, 1) + 5e-4 * p.detach()
            p.data -= lr * speed[name]
    assert cut, "the gradient was long enough to be cut"
    assert model.learned_.keys() == parameters.keys()
    for name, p in parameters.items():
        assert_close(model.learned_[name], p.detach(), 2e-4)


def test_training_starts_from_the_templates_own_features(backbone):
    learner = learner_of(backbone)
    for texts, templates in zip(learner.texts(), GROUPS, strict=True):
        with torch.no_grad():
            assert_close(texts, backbone.encode_texts([templates[0].replace("{}", name) for name in NAMES]))


def test_the_general_groups_share_out_the_templates_of_clip():
    groups = general_groups()
    assert sorted(t for group in groups for t in group) == sorted(class_texts(["{}"], "openai-80")[0])
    assert [group[0] for group in groups] == [
        "a low resolution photo of a {}.",
        "a drawing of a {}.",
        "a rendering of a {}.",
        "a sculpture of a {}.",
        "a photo of a {}.",
    ]
    assert "a cartoon {}." in groups[1]
    assert "a {} in a video game." in groups[2]
    assert "itap of my {}." in groups[4]


def test_one_group_is_coop(backbone, batch):
    learner = learner_of(backbone, [["a photo of a {}."]], text_weight=0, gate_weight=0)
    before, after = learner.contexts[0][:4], learner.contexts[0][4:]
    plain = coop(backbone, NAMES, before)  # whose period is a fixed word
    assert len(after) == 1
    assert_close(learner.logits(batch.features, learner.texts()), plain.logits(batch.features, plain.texts()).detach())
    learner.loss(batch)[0].backward()
    plain.loss(batch)[0].backward()
    assert_close(learner.contexts[0].grad[:4], plain.context.grad)


def test_routing(backbone, batch):
    gate = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    weights = routing(gate, 2)
    assert_close(weights.sum(1), torch.ones(6))
    assert (weights > 0).sum(1).tolist() == [2] * 6
    assert torch.equal(weights.argmax(1), gate.argmax(1))
    learner = shaken(learner_of(backbone, top_k=4))
    torch.nn.init.zeros_(learner.router.weight)
    torch.nn.init.zeros_(learner.router.bias)
    texts = learner.texts()
    average = torch.stack([backbone.logit_scale * batch.features @ t.T for t in texts]).mean(0)
    assert_close(learner.logits(batch.features, texts), average.detach())


def test_a_prompt_that_no_image_chooses_learns_from_its_templates_only(backbone, batch):
    for text_weight in (0.0, 5.0):
        learner = shaken(learner_of(backbone, text_weight=text_weight))
        learner.router.bias.data[1] = -100.0
        learner.loss(batch)[0].backward()
        assert (learner.contexts[1].grad.abs().max() > 0) == (text_weight > 0)


def test_guidance_is_shared_by_the_two_best_groups(backbone, batch):
    prototypes = learner_of(backbone).prototypes[:, batch.labels]  # (G, B, D)
    target = guidance(batch.features, prototypes, 2)
    similar = (batch.features * prototypes).sum(-1).T
    assert_close(target.sum(1), torch.ones(5))
    assert (target.topk(2).values > 0.25).all()
    assert (target.topk(3).values[:, 2] < 1e-3).all()
    assert torch.equal(target.topk(2).indices, similar.topk(2).indices)


def test_prototypes_follow_the_labels(backbone, batch):
    order = [2, 0, 1]
    learner = shaken(learner_of(backbone))
    permuted = create("mocoop", groups=GROUPS).bind(backbone, [NAMES[c] for c in order])
    permuted.load_state_dict(learner.state_dict())
    labels = torch.tensor([order.index(label) for label in batch.labels.tolist()])
    loss = permuted.loss(Batch(batch.rows, labels, batch.features, None))[0]
    assert_close(loss, learner.loss(batch)[0].detach())


def test_new_classes_keep_prompts_and_router(backbone):
    model = create("mocoop", groups=GROUPS, epochs=3).fit(backbone, colours(2, seed=1))
    other = model.with_classes(NAMES)
    for name, tensor in other._bound.named_parameters():
        assert torch.equal(tensor, model.learned_[name])
    assert_close(other._texts, torch.stack([torch.stack(g) for g in plain_texts(backbone, other._bound)]).detach())
    assert other.predict(colours(1, seed=3)).shape == (4,)


def test_groups_that_cannot_be_used_are_refused(backbone):
    support = colours(1, seed=1)
    with pytest.raises(ClipadaptError, match="no words"):
        create("mocoop", groups=[["{}"]]).fit(backbone, support)
    with pytest.raises(ClipadaptError, match="template set"):
        create("mocoop", groups=["imagenet7"]).fit(backbone, support)
