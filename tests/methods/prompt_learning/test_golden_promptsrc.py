"""PromptSRC gives the figures of its official implementation: four losses, gradients, four epochs and their average."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize
from torch.optim.optimizer import register_optimizer_step_post_hook

from clipadapt.backbones import load_backbone
from clipadapt.data import class_texts
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from clipadapt.methods.kinds.prompts import Batch
from clipadapt.methods.prompt_learning.promptsrc import RegulatedPrompts, mean_texts
from clipadapt.training.averages import Average, gaussian_weights
from clipadapt.training.loop import Run, train
from tests.golden import NAMES, Golden, assert_close, golden_backbone
from tests.images import colours
from tests.tiny import tiny_clip

VARIANTS = ["shallow", "deep", "deep_words"]
TEACHER = ["a photo of a {}.", "a bad photo of the {}.", "itap of my {}."]


def parameter_names(golden: Golden) -> list[str]:
    """The golden names of our parameters, in our order: the text tower's, then the image tower's."""
    layer = "transformer.resblocks.{}.VPT_shallow"
    textual = ["ctx", *(layer.format(j) for j in range(1, int(golden["depth_text"])))]
    visual = ["visual.VPT", *(f"visual.{layer.format(j)}" for j in range(1, int(golden["depth_vision"])))]
    return [*textual, *visual]


def golden_learner(golden: Golden, backbone, key: str = "promptsrc", **settings):
    """The learner of a method with vectors in both towers; the official code counts the blocks of each by itself."""
    names = parameter_names(golden)
    textual = [golden[name] for name in names if not name.startswith("visual")]
    visual = [golden[name] for name in names if name.startswith("visual")]
    settings |= {"n_ctx": len(textual[0]), "n_visual": len(visual[0]), "depth": max(len(textual), len(visual))}
    init = "a photo of a" if golden.variant.endswith("words") else None  # three of its tokens are learned
    learner = create(key, init=init, **settings).bind(backbone, NAMES)
    learner.textual, learner.visual = nn.ParameterList(textual), nn.ParameterList(visual)
    return learner


def official(golden: Golden) -> dict:
    weights = {name: float(golden[name]) for name in ("text_weight", "image_weight")}
    return {"teacher_templates": TEACHER, "kl_mean": "logits", **weights}


@pytest.fixture(params=VARIANTS)
def golden(shared, request) -> Golden:
    return Golden(shared, "promptsrc", request.param)


@pytest.fixture
def learner(golden, shared) -> RegulatedPrompts:
    return golden_learner(golden, golden_backbone(shared), **official(golden))


@pytest.fixture
def batch(golden) -> Batch:
    return Batch(torch.arange(4), golden["labels"], None, golden["pixels"])


def test_features_losses_and_gradients(golden, learner, batch):
    assert_close(mean_texts(learner.backbone, NAMES, TEACHER, 60), golden["fixed_embeddings"])
    assert_close(learner.teacher, normalize(golden["fixed_embeddings"], dim=1))
    frozen = learner.frozen_images(batch)
    assert not frozen.requires_grad
    assert_close(frozen, golden["zero_shot_image_features_normalized"])
    assert_close(learner.logits(frozen, learner.teacher), golden["zero_shot_logits"])
    assert_close(learner.texts(), golden["text_features_normalized"])
    assert_close(learner.seen(batch), golden["image_features_normalized"])
    terms, logits = learner.losses(batch)
    assert_close(logits, golden["logits"])
    for name, term in {"labels": "ce", "texts": "scl_text", "images": "scl_image", "logits": "scl_logits"}.items():
        assert_close(terms[name], golden[f"loss_{term}"])
    loss, hits = learner.loss(batch)
    assert_close(loss, golden["loss_total"])
    assert torch.equal(hits, golden["logits"].argmax(1) == golden["labels"])
    loss.backward()
    for parameter, name in zip(learner.parameters(), parameter_names(golden), strict=True):
        assert_close(parameter.grad, golden[f"grad/{name}"])


def test_divergence_of_the_paper_is_one_for_each_image(golden, learner, batch):
    learner.of.kl_mean = "pictures"
    teacher, student = (golden[name].softmax(1).double() for name in ("zero_shot_logits", "logits"))
    each = [sum(t * (t / s).log() for t, s in zip(*rows, strict=True)) for rows in zip(teacher, student, strict=True)]
    term = learner.losses(batch)[0]["logits"]
    torch.testing.assert_close(term.detach().double(), sum(each) / 4, rtol=1e-3, atol=1e-6)
    assert_close(term, len(NAMES) * golden["loss_scl_logits"])


def test_four_epochs_and_their_average(golden, learner, batch):
    mean, std, epochs = golden["gpa_mean_std_epochs"].tolist()
    torch.testing.assert_close(gaussian_weights(int(epochs), mean, std), golden["gpa_weights"], rtol=1e-12, atol=0)
    parameters, names = list(learner.parameters()), parameter_names(golden)
    average = Average.gaussian(parameters, mean, std, int(epochs), per_epoch=1)

    def after_step(number: int) -> None:
        for parameter, name in zip(parameters, names, strict=True):
            assert_close(parameter, golden[f"epoch{number + 1}/{name}"])
        average.update(number)

    optimizer = torch.optim.SGD(parameters, lr=float(golden["sgd_lr"]))
    train(lambda _: learner.loss(batch), optimizer, range(4), after_step=after_step)
    with torch.no_grad():
        average.copy_to(parameters)
        for parameter, name in zip(parameters, names, strict=True):
            assert_close(parameter, golden[f"gpa/{name}"])
        assert_close(learner.logits(learner.seen(batch), learner.texts()), golden["gpa/logits"])


def test_published_weights(shared):
    stored = np.load(shared / "golden" / "promptsrc_gpa_weights.npz")
    for name, weights in stored.items():
        mean, std, epochs = (float(part.lstrip("meanstdpoch")) for part in name.split("_"))
        ours = gaussian_weights(int(epochs), mean, std)
        torch.testing.assert_close(ours, torch.from_numpy(weights), rtol=1e-10, atol=1e-300)
    assert gaussian_weights(3, 500, 0.1).tolist() == [0, 0, 1], "far from the mean, where densities are zero"


def test_teacher_reads_the_sixty_published_sentences():
    sixty = class_texts(["cat"], "openai-80")[0][:60]
    assert sixty[-1] == "itap of the cat."
    assert "a photo of a cat." in sixty
    assert create("promptsrc").n_templates == 60
    with pytest.raises(ClipadaptError, match="kl_mean"):
        create("promptsrc", kl_mean="sum")


# -- a whole fit -----------------------------------------------------------------------------------------------------

SETTING = {"epochs": 3, "batch_size": 6, "lr": 0.02, "gpa_mean": 2.0, "n_templates": 3, "depth": 2}


def fit(resume=None, report=None, **more):
    return create("promptsrc", **{**SETTING, **more}).fit(
        load_backbone(tiny_clip()), colours(4, seed=1), report=report, resume=resume
    )


def test_what_is_kept_is_the_average_over_epochs():
    steps = []

    def remember(optimizer, *_):
        steps.append([p.detach().clone() for group in optimizer.param_groups for p in group["params"]])

    handle = register_optimizer_step_post_hook(remember)
    model = fit()
    handle.remove()
    assert len(steps) == 9  # 16 images are three batches
    weights = np.exp(-0.5 * (np.array([1, 2, 3]) - 2.0) ** 2)
    for i, kept in enumerate(model.learned_.values()):
        average = sum(w * steps[3 * e + 2][i] for e, w in enumerate(weights / weights.sum()))
        torch.testing.assert_close(kept, average, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(kept, steps[-1][i], rtol=0, atol=1e-6)


@pytest.mark.parametrize("min_scale", [0.3, 1.0])
def test_an_interrupted_fit_ends_bit_for_bit_as_it_would_have(tmp_path, monkeypatch, min_scale):
    whole = fit(min_scale=min_scale)
    monkeypatch.setattr(Run.__init__, "__defaults__", (None, None, 0.0))  # kept after every step

    def interrupt(line):
        if line["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, interrupt, min_scale=min_scale)
    rest: list[dict] = []
    resumed = fit(tmp_path, rest.append, min_scale=min_scale)
    assert 1 < rest[0]["step"] <= 6
    assert rest[-1]["step"] == 9
    for name, tensor in whole.learned_.items():
        assert torch.equal(resumed.learned_[name], tensor)


def test_teacher_features_of_unchanging_views_are_encoded_once(monkeypatch):
    """Without random crops they are those that the frozen tower gives in every step."""
    once = fit(min_scale=1.0)
    monkeypatch.setattr(RegulatedPrompts, "frozen", property(lambda self: None, lambda self, value: None))
    every_step = fit(min_scale=1.0)
    for name, tensor in once.learned_.items():
        torch.testing.assert_close(every_step.learned_[name], tensor, rtol=1e-4, atol=1e-5)
