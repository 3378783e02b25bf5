"""m2-Mix: its training equals a plain one; what is drawn depends on the step alone; geodesic against linear."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import normalize

from clipadapt.losses.contrastive import info_nce
from clipadapt.losses.geodesic import alignment, both_modal_mixup, multi_modal_mixup, slerp, uni_modal_mixup
from clipadapt.methods import create
from clipadapt.methods.robust_fine_tuning.m2_mix import mixed
from clipadapt.training.loop import batches
from clipadapt.training.schedules import cosine
from tests.images import colours

QUICK = {"lr": 1e-3, "epochs": 3, "batch_size": 6}
WEIGHTS = {"m2_mix": 0.3, "v_mix": 0.2, "l_mix": 0.1, "vl_mix": 0.15}


class Towers(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, pixels, ids):
        images = self.inner.get_image_features(pixels).pooler_output
        return normalize(images, dim=1), normalize(self.inner.get_text_features(input_ids=ids).pooler_output, dim=1)


@pytest.mark.parametrize("weights", [dict.fromkeys(WEIGHTS, 0.0), WEIGHTS], ids=["plain", "mixed"])
def test_training_equals_a_plain_one(backbone, support, weights):
    """With no weights it is contrastive fine-tuning."""
    lines: list[dict] = []
    model = create("m2-mix", **QUICK, **weights, seed=3).fit(backbone, support, report=lines.append)
    state = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    trained = {name: state[name].requires_grad_() for name in model.update_}
    assert set(state) - set(trained) <= {"logit_scale"} | {n for n in state if n.endswith("position_ids")}
    pixels = torch.stack([backbone.preprocess(item.open()) for item in support.items])
    ids = backbone.tokenize([f"a photo of a {name}." for name in support.class_names])
    labels = torch.tensor(support.labels)
    steps = batches(len(support), 6, epochs=3, seed=3)
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.2)
    scale, losses = backbone.logit_scale, []
    for number, rows in enumerate(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * cosine(number, len(steps), len(steps) // 10)
        optimizer.zero_grad()
        named = {f"inner.{name}": tensor for name, tensor in state.items()}
        images, texts = functional_call(Towers(backbone.model), named, (pixels[rows], ids[labels[rows]]))
        draw = np.random.default_rng([3, number])
        a, b, c, d = draw.beta(0.5, 0.5, size=4)
        extra = weights["m2_mix"] * multi_modal_mixup(images, texts, a, 1 / 0.07)
        extra = extra + weights["v_mix"] * uni_modal_mixup(images, texts, b, scale)
        extra = extra + weights["l_mix"] * uni_modal_mixup(texts, images, c, scale)
        extra = extra + weights["vl_mix"] * both_modal_mixup(images, texts, d, scale)
        loss = info_nce(images, texts, scale) + extra / (1 + number // 2)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose([line["loss"] for line in lines], losses, atol=1e-4)
    # features, not weights: biases of keys have no gradient but rounding, which Adam blows up
    named = {f"inner.{name}": tensor.detach() for name, tensor in state.items()}
    images, texts = functional_call(Towers(backbone.model), named, (pixels, ids))
    torch.testing.assert_close(model.backbone_.encode_images(pixels), images, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.backbone_.encode_tokens(ids), texts, rtol=0, atol=1e-4)


def test_no_rate_is_zero_shot(backbone, support):
    queries = colours(2, seed=2)
    zero_shot = create("zero-shot").fit(backbone, support).predict_proba(queries)
    model = create("m2-mix", **{**QUICK, "lr": 0.0}).fit(backbone, support)
    np.testing.assert_allclose(model.predict_proba(queries), zero_shot, atol=1e-6)


def test_draws_are_a_function_of_seed_and_step_and_follow_the_beta(backbone):
    image, text = normalize(torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    method = create("m2-mix", m2_mix=1.0, temperature=None)
    values = [float(mixed(method, image, text, number, 10.0)) for number in (0, 1, 7, 1)]
    assert values[1] == values[3]
    assert len(set(values)) == 3
    other = create("m2-mix", m2_mix=1.0, temperature=None, seed=2)
    assert float(mixed(other, image, text, 1, 10.0)) != values[1]
    # with a narrow Beta all mixing is half and half
    narrow = create("m2-mix", m2_mix=1.0, temperature=None, beta=1e6)
    expected = multi_modal_mixup(image, text, 0.5, 10.0)
    torch.testing.assert_close(mixed(narrow, image, text, 5, 10.0), expected, atol=1e-2, rtol=0)


def test_options(backbone):
    image, text = normalize(torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0)), dim=-1)

    def value(**changed):
        return float(mixed(create("m2-mix", **{"m2_mix": 1.0, **changed}), image, text, 2, 10.0))

    weight = np.random.default_rng([1, 2]).beta(0.5, 0.5)
    assert value() == pytest.approx(float(multi_modal_mixup(image, text, weight, 1 / 0.07)), abs=1e-5)
    assert value(temperature=None) == pytest.approx(float(multi_modal_mixup(image, text, weight, 10.0)), abs=1e-5)
    assert value(mixing="linear") < value()
    assert value(m2_mix=0.0) == 0


def test_mixed_negatives_pull_the_modalities_together():
    """The paper's claim about what the loss does, on free features: alignment improves beyond InfoNCE's own."""

    def trained(weight: float) -> float:
        generator = torch.Generator().manual_seed(0)
        rows = normalize(torch.randn(2, 24, 8, generator=generator), dim=-1)
        rows[0, :, 0] += 2  # two cones, as CLIP's
        rows[1, :, 1] += 2
        image, text = (r.clone().requires_grad_() for r in rows)
        optimizer = torch.optim.Adam([image, text], lr=0.02)
        for step in range(60):
            x, y = normalize(image, dim=1), normalize(text, dim=1)
            mixing = float(np.random.default_rng(step).beta(0.5, 0.5))
            loss = info_nce(x, y, 20.0) + weight * multi_modal_mixup(x, y, mixing, 20.0, slerp)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(alignment(normalize(image, dim=1), normalize(text, dim=1)).detach())

    assert trained(1.0) < trained(0.0) - 0.05
