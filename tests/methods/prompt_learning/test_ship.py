"""SHIP: the synthesis by plain computation, what is handed to the wrapped method, and what it gains from it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import clipadapt
from clipadapt.backbones import Insertion, load_backbone
from clipadapt.data import Dataset
from clipadapt.data.items import FeatureItem
from clipadapt.data.playground.drawing import HELDOUT_STYLE, Playground
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.features import encode_classes, encode_images
from clipadapt.methods import FeatureMethod, create
from clipadapt.methods.prompt_learning.ship import Ship, Synthesis, sample, synthesis_loss, trained
from clipadapt.training.loop import Run
from tests.images import colours
from tests.tiny import tiny_clip

SMALL = {"encoder_width": 32, "generator_width": 32, "epochs": 5, "batch_size": 8, "n_ctx": 3}


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


@pytest.fixture
def support() -> Dataset:
    """Three colours with four images each, and a fourth without any."""
    return colours(4, seed=1).select(range(12))


def coop():
    return create("coop", n_ctx=3, epochs=5, lr=0.05)


def spoken(backbone, context: torch.Tensor, name: str) -> torch.Tensor:
    """The unit feature (D,) of one prompt with these context vectors (n, W), by the tower's own forward."""
    ids = backbone.tokenize([" ".join(["a"] * len(context)) + f" {name}."])
    with backbone.inserted(text=[Insertion(context, at=1)]):
        return backbone.encode_tokens(ids)[0]


def test_loss_by_plain_sums():
    torch.manual_seed(0)
    made, images = normalize(torch.randn(3, 5), dim=1), normalize(torch.randn(3, 5), dim=1)
    mean, log_var = torch.randn(3, 5), torch.randn(3, 5)
    total = 0.0
    for b in range(3):
        for d in range(5):
            m, v = mean[b, d].item(), log_var[b, d].item()
            total += (made[b, d] - images[b, d]).item() ** 2 + 0.3 * -0.5 * (1 + v - m**2 - np.exp(v))
    assert synthesis_loss(made, images, mean, log_var, 0.3).item() == pytest.approx(total / 3, rel=1e-5)
    normal = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    divergence = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(synthesis_loss(made, made, mean, log_var), divergence)


def test_first_step_by_plain_computation(backbone, support, monkeypatch):
    """Loss and gradients of a step, each image's prompt through the tower on its own."""
    images = encode_images(backbone, support).features
    seen: dict[str, torch.Tensor] = {}

    def first(loss_of, optimizer, steps, run):
        seen["rows"], seen["number"] = steps[0][1], torch.tensor(steps[0][0])
        seen["loss"] = loss_of(steps[0])
        seen["loss"].backward()

    monkeypatch.setattr("clipadapt.methods.prompt_learning.ship.train", first)
    method = Ship(**SMALL)
    synthesis = trained(method, backbone, support, images, Run())
    rows = seen["rows"].tolist()
    assert len(rows) == 8
    assert len({support.labels[row] for row in rows}) == 3
    noise = torch.randn(8, 16, generator=torch.Generator().manual_seed(1_000_003 + int(seen["number"])))
    parameters = dict(synthesis.named_parameters())
    w = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    total = torch.zeros(())
    for noise_of_row, row in zip(noise, rows, strict=True):
        x = images[row]
        hidden = (w["hidden.0.weight"] @ x + w["hidden.0.bias"]).clamp(min=0)
        mean = w["mean.weight"] @ hidden + w["mean.bias"]
        log_var = w["log_var.weight"] @ hidden + w["log_var.bias"]
        z = mean + noise_of_row * (log_var / 2).exp()
        shift = w["shift.2.weight"] @ (w["shift.0.weight"] @ z + w["shift.0.bias"]).clamp(min=0) + w["shift.2.bias"]
        made = spoken(backbone, w["context"] + shift, support.class_names[support.labels[row]])
        total = total + 2 - 2 * made @ x - 0.5 * (1 + log_var - mean**2 - log_var.exp()).sum()
    (total / 8).backward()
    torch.testing.assert_close(seen["loss"], total / 8, rtol=1e-4, atol=1e-5)
    for name, parameter in parameters.items():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, w[name].grad, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in backbone.model.parameters())


def test_start_values():
    torch.manual_seed(0)
    synthesis = Synthesis(64, 48, 4, 256, 512)
    for layer in (synthesis.hidden[0], synthesis.mean, synthesis.log_var, synthesis.shift[0], synthesis.shift[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.bias.abs().max() == 0
    assert synthesis.context.shape == (4, 48)
    assert [tuple(p.shape) for p in synthesis(torch.zeros(2, 64))] == [(2, 64), (2, 64)]


def test_sampled_features_by_plain_computation(backbone):
    names = ["cat", "large dog"]
    torch.manual_seed(1)
    synthesis = Synthesis(16, 24, 3, 32, 32)
    for parameter in synthesis.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    z = torch.randn(5, 16)
    made = sample(backbone, synthesis, names, z)
    assert made.shape == (2, 5, 16)
    assert not made.requires_grad
    with torch.no_grad():
        for c, name in enumerate(names):
            for i in range(5):
                expected = spoken(backbone, synthesis.context + synthesis.shift(z[i]), name)
                torch.testing.assert_close(made[c, i], expected, atol=1e-5, rtol=1e-4)
    assert (made[0, 0] - made[0, 1]).abs().max() > 1e-3, "latents matter"


class Recorder:
    """Stands in for a wrapped method's learning, and keeps what it was given."""

    def __init__(self, monkeypatch) -> None:
        def take(method, images, labels, texts, logit_scale, val, *more):
            self.images, self.labels, self.texts, self.val = images, list(labels), texts, val
            original(method, images, labels, texts, logit_scale, val, *more)

        original = FeatureMethod._take
        monkeypatch.setattr(FeatureMethod, "_take", take)


def test_the_wrapped_method_gets_real_and_made_features(backbone, support, monkeypatch):
    given = Recorder(monkeypatch)
    val = colours(1, seed=3).select(range(3))
    model = create("ship", method="tip-adapter", new_classes=["dog", "red"], per_class=6, **SMALL)
    model.fit(backbone, support, val=val)
    names = [*support.class_names, "dog"]
    assert model.class_names_ == names
    assert given.labels == [*support.labels, *[4] * 6, *[3] * 6], "classes without images by name: dog, then yellow"
    torch.testing.assert_close(given.images[:12], encode_images(backbone, support).features)
    torch.testing.assert_close(given.images[12:].norm(dim=1), torch.ones(12))
    torch.testing.assert_close(given.texts, encode_classes(backbone, names, "photo"))
    assert list(given.val[1]) == val.labels
    assert create("ship", method="tip-adapter", **SMALL).fit(backbone, support).inner_[0].keys_.shape == (12 + 4, 16)


def test_without_missing_classes_it_is_the_wrapped_method(backbone):
    full, queries = colours(3, seed=1), colours(2, seed=2)
    for inner in ("tip-adapter", coop()):
        plain = create(inner) if isinstance(inner, str) else coop()
        expected = plain.fit(backbone, full).predict_proba(queries)
        model = create("ship", method=inner, **SMALL).fit(backbone, full)
        np.testing.assert_array_equal(model.predict_proba(queries), expected)
        assert model.trained_parameters == plain.trained_parameters


@pytest.mark.parametrize("inner", ["tip-adapter", "clip-adapter", "coop"])
def test_saved_and_loaded(backbone, support, inner, tmp_path):
    method = coop() if inner == "coop" else inner
    model = create("ship", method=method, new_classes=["dog"], **SMALL).fit(backbone, support)
    if inner == "coop":
        assert not hasattr(method, "learned_"), "the method that was given is a recipe; it stays unfitted"
        assert model.trained_parameters == 3 * 24, "nothing of the synthesis is kept"
    queries = colours(2, seed=2)
    loaded = clipadapt.load(model.save(tmp_path / "model"), backbone)
    assert loaded.class_names_ == [*support.class_names, "dog"]
    np.testing.assert_array_equal(loaded.predict_proba(queries), model.predict_proba(queries))
    if inner == "coop":
        other = loaded.with_classes(["cat", "red"])
        assert other.predict_proba(queries).shape == (8, 2)
        assert loaded.predict_proba(queries).shape == (8, 5)
    else:
        with pytest.raises(ClipadaptError, match="cannot be applied to new classes"):
            loaded.with_classes(["cat", "red"])


def test_an_interrupted_synthesis_goes_on(backbone, support, tmp_path, monkeypatch):
    """In either stage: the numbers that were drawn are drawn again."""
    monkeypatch.setattr("clipadapt.training.loop.SAVE_EVERY", 0.0)
    queries, lines = colours(2, seed=2), []

    def method() -> Ship:
        return create("ship", method=coop(), **SMALL)

    expected = method().fit(backbone, support, report=lines.append).predict_proba(queries)
    for stop in (3, len(lines) - 2):
        left = stop

        def interrupt(line):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            method().fit(backbone, support, report=interrupt, resume=tmp_path)
        assert list(tmp_path.rglob("run-1.safetensors"))
        steps = []
        model = method().fit(backbone, support, report=steps.append, resume=tmp_path)
        assert len(steps) == len(lines) - stop + 1, "the step that was interrupted, and those after it"
        np.testing.assert_array_equal(model.predict_proba(queries), expected)


@pytest.mark.parametrize("inner", ["vpt", "fine-tune"])
def test_a_method_that_needs_images_is_refused(backbone, support, inner):
    with pytest.raises(ClipadaptError, match=f"ship synthesises features, and {inner} learns from images"):
        create("ship", method=inner).fit(backbone, support)


def test_prompts_learn_the_same_from_ready_features(backbone):
    """`FeatureItem`: a prompt method is trained on features as on the images that they are of."""
    data = colours(3, seed=1)
    items = [FeatureItem(str(i), x) for i, x in enumerate(encode_images(backbone, data).features)]
    ready = dataclasses.replace(data, items=items)
    learned = [coop().fit(backbone, each).learned_["context"] for each in (data, ready)]
    torch.testing.assert_close(*learned, rtol=0, atol=0)
    with pytest.raises(DataError, match="has no pixels"):
        items[0].open()
    assert items[0].digest() != items[1].digest()


def test_more_divergence_more_collapse_and_reconstruction_learns(backbone, support):
    """The distance falls; with little weight on the divergence, made features of a class differ."""
    images = encode_images(backbone, support).features
    spread = []
    for kl in (1.0, 1e-3):
        losses: list[float] = []
        method = Ship(**{**SMALL, "epochs": 60, "lr": 5e-3}, kl=kl)
        run = Run(lambda line, losses=losses: losses.append(line["loss"]))
        synthesis = trained(method, backbone, support, images, run)
        assert np.mean(losses[-5:]) < 0.7 * losses[0]
        made = sample(backbone, synthesis, support.class_names, torch.randn(8, 16))
        spread.append((1 - (made * normalize(made.mean(1, keepdim=True), dim=2)).sum(2)).mean().item())
    assert spread[1] > 3 * spread[0]


GAIN = {
    "tip-adapter": {},
    "tip-adapter-f": {},
    "clip-adapter": {"lr": 0.1, "epochs": 30},
    "coop": {"init": "a photo of a", "lr": 0.02, "epochs": 10},
}


@pytest.mark.claim("ship", "six classes without pictures: made features against none, for four wrapped methods")
@pytest.mark.parametrize("key", GAIN)
def test_made_features_raise_accuracy_on_new_classes(key, claim):
    """Six kinds of sketches (a style new to the model) with images, six without; these are told from all twelve."""
    backbone = load_backbone()
    base = ("snail", "cup", "tree", "kite", "ring", "bus")
    new = ("fish", "crown", "house", "apple", "star", "lamp")
    support = Playground(size=48, kinds=base, styles=(HELDOUT_STYLE,), seed=1).dataset(8)
    test = Playground(size=48, kinds=new, styles=(HELDOUT_STYLE,), seed=101).dataset(15)
    support = dataclasses.replace(support, class_names=[*base, *new])
    without = create(key, **GAIN[key]).fit(backbone, support).score(test)
    method = create("ship", method=create(key, **GAIN[key]), epochs=20, encoder_width=256, generator_width=512)
    made = method.fit(backbone, support).score(test)
    claim({"ship": made, "without": without})
    assert made > without + 0.05
