"""VL-Adapter: towers stay as they are, the adapters are those of a plain computation, and tasks share them as asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import clipadapt
from clipadapt.backbones import load_backbone
from clipadapt.data import Dataset
from clipadapt.data.items import ImageItem
from clipadapt.data.playground.drawing import TRAIN_KINDS, Playground
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_classes
from clipadapt.methods import create
from clipadapt.methods.peft_weights.vl_adapter import linear
from clipadapt.nn.updates import Bottlenecks
from clipadapt.training.loop import batches, seeded
from tests.images import colours
from tests.tiny import tiny

QUICK = {"lr": 1e-2, "epochs": 4, "batch_size": 6}


def sites_of(backbone, tower: str = "both") -> list[str]:
    return backbone.target_modules(tower, ("o", "fc2"))


def test_no_rate_is_zero_shot(backbone, support):
    queries = colours(2, seed=2)
    zero_shot = create("zero-shot").fit(backbone, support).predict_proba(queries)
    model = create("vl-adapter", **{**QUICK, "lr": 0.0}).fit(backbone, support)
    np.testing.assert_allclose(model.predict_proba(queries), zero_shot, atol=1e-6)


@pytest.mark.parametrize("tower", ["both", "vision", "text"])
def test_training_equals_a_plain_one(backbone, support, tower):
    model = create("vl-adapter", **QUICK, tower=tower, seed=3).fit(backbone, support)
    with seeded(3):
        adapters = Bottlenecks(backbone.model, sites_of(backbone, tower))
    matrices = [p for p in adapters.parameters() if p.ndim == 2]
    biases = [p for p in adapters.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    pixels = torch.stack([backbone.preprocess(item.open()) for item in support.items])
    labels = torch.tensor(support.labels)
    steps = batches(len(support), 6, epochs=4, seed=3)
    for number, rows in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (len(steps) - number) / len(steps)
        optimizer.zero_grad()
        with adapters.attached(backbone.model):
            images = backbone.encode_images(pixels[rows])
            texts = backbone.encode_texts([f"a photo of a {name}." for name in support.class_names])
        cross_entropy(backbone.logit_scale * images @ texts.T, labels[rows]).backward()
        torch.nn.utils.clip_grad_norm_(matrices + biases, 5.0)
        optimizer.step()
    for name, parameter in adapters.named_parameters():
        torch.testing.assert_close(model.update_[name], parameter.detach(), rtol=1e-3, atol=1e-4, msg=name)


def test_the_schedule():
    assert [linear(step, 10, 2) for step in (0, 1, 2, 6, 9)] == [0.5, 1.0, 1.0, 0.5, 0.125]
    assert linear(0, 5, 0) == 1


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_adapted_features_are_used_and_the_backbone_is_not(family, support):
    backbone = load_backbone(tiny(family))
    pixels = torch.stack([backbone.preprocess(item.open()) for item in support.items])
    plain = backbone.encode_images(pixels)
    model = create("vl-adapter", **QUICK).fit(backbone, support)
    torch.testing.assert_close(backbone.encode_images(pixels), plain, rtol=0, atol=0)
    adapted = model.encoder.encode(pixels)
    assert (adapted - plain).abs().max() > 0.01
    with model.attached() as inside:
        texts = encode_classes(inside, model.class_names_)
    expected = backbone.logit_scale * adapted @ texts.T
    torch.testing.assert_close(model.image_logits(support)[0], expected, rtol=0, atol=1e-3)
    pixels = pixels[:1].requires_grad_()
    model.encoder.encode(pixels)[0, 0].backward()
    assert pixels.grad.abs().max() > 0


def test_sites_share_what_they_are_told(backbone, support):
    """Widths are 24 and 32 in the two towers, each with 3 blocks of 2 sites; bottlenecks have 3 and 4 units."""
    counts = {}
    for sites in ("none", "down", "up", "all"):
        counts[sites] = create("vl-adapter", **QUICK, sites=sites).fit(backbone, support).trained_parameters
    downs, ups = 24 * 3 + 3 + 32 * 4 + 4, 3 * 24 + 24 + 4 * 32 + 32
    assert counts == {"none": 6 * (downs + ups), "down": downs + 6 * ups, "up": 6 * downs + ups, "all": downs + ups}


@pytest.mark.parametrize("share", ["none", "down", "up", "all"])
def test_tasks_share_what_they_are_told(backbone, support, share, tmp_path):
    first, second = support.only(support.class_names[:2]), support.only(support.class_names[2:])
    recipe = create("vl-adapter", **QUICK, tasks=share)
    lines: list[dict] = []
    models = recipe.fit_tasks(backbone, [first, second], report=lines.append)
    assert not hasattr(recipe, "class_names_"), "itself stays unfitted"
    assert len(lines) == 2 * 4, "a batch an epoch and a task"
    assert [model.class_names_ for model in models] == [first.class_names, second.class_names]
    halves = {"down": ("down", "all"), "up": ("up", "all")}
    for name, tensor in models[0].update_.items():
        same = torch.equal(tensor, models[1].update_[name])
        assert same == (share in halves[name.split(".")[2]]), name
    for i, (model, data) in enumerate(zip(models, (first, second), strict=True)):
        loaded = clipadapt.load(model.save(tmp_path / str(i)), backbone)
        np.testing.assert_array_equal(loaded.predict_proba(data), model.predict_proba(data))
    if share == "all":
        other = models[0].with_classes(second.class_names)
        np.testing.assert_allclose(other.predict_proba(second), models[1].predict_proba(second), atol=1e-6)


def test_one_task_is_fit(backbone, support):
    one = create("vl-adapter", **QUICK).fit_tasks(backbone, [support])[0]
    np.testing.assert_array_equal(
        one.predict_proba(support), create("vl-adapter", **QUICK).fit(backbone, support).predict_proba(support)
    )


def test_tasks_without_labels_are_refused(backbone, support):
    with pytest.raises(ClipadaptError, match="at least one support set"):
        create("vl-adapter").fit_tasks(backbone, [])
    with pytest.raises(ClipadaptError, match="learns from labelled images"):
        create("vl-adapter").fit_tasks(backbone, [support, support.select([])])


def test_restored_adapters_compute_what_the_model_does(backbone, support):
    model = create("vl-adapter", **QUICK).fit(backbone, support)
    pixels = torch.stack([backbone.preprocess(item.open()) for item in support.items])
    with Bottlenecks.restore(model.update_, backbone.model, sites_of(backbone)).attached(backbone.model):
        again = backbone.encode_images(pixels)
    torch.testing.assert_close(model.encoder.encode(pixels), again, rtol=0, atol=0)


@pytest.mark.claim("vl-adapter", "two tasks of nine drawn things: one shared adapter is no worse than one for each")
def test_one_adapter_serves_two_tasks(claim):
    """Catalogue: an adapter that tasks share is at least equal to one for each. Two tasks of nine drawn things."""
    backbone = load_backbone()
    kinds = TRAIN_KINDS[::3]

    def drawn(seed: int, n: int) -> list[Dataset]:
        sets = []
        for chosen in (kinds[:9], kinds[9:]):
            data = Playground(seed=seed).dataset(n, kinds=chosen, styles=("flat", "watercolour", "chalk"))
            items = [ImageItem(item.name, item.open()) for item in data.items]
            sets.append(Dataset([*items], data.labels, data.class_names))
        return sets

    supports, tests = drawn(1, 10), drawn(2, 15)
    zero_shot = [create("zero-shot").fit(backbone, data).score(data) for data in tests]
    scores = {}
    for share in ("all", "none"):
        models = create("vl-adapter", lr=3e-3, epochs=6, tasks=share).fit_tasks(backbone, supports)
        scores[share] = [model.score(data) for model, data in zip(models, tests, strict=True)]
    claim({"vl-adapter": scores["all"], "one for each": scores["none"], "zero-shot": zero_shot})
    shared, apart = np.mean(scores["all"]), np.mean(scores["none"])
    assert shared > np.mean(zero_shot) + 0.05, (zero_shot, scores)
    assert shared > apart - 0.02, (zero_shot, scores)
