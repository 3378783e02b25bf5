"""Methods that touch the towers give the figures of the official implementations (golden/README-prompts.md)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.methods.feature_adapter.clip_adapter import adapt
from clipadapt.methods.robust_fine_tuning.wise_ft import interpolate
from clipadapt.nn.updates import LowRank
from clipadapt.training.loop import train

TOLERANCE = 5e-5  # relative to the largest value of an array: what the golden page calls comfortable


def close(ours: Tensor, golden: np.ndarray, tolerance: float = TOLERANCE) -> None:
    ours = ours.detach()
    assert tuple(ours.shape) == golden.shape
    assert (ours - torch.from_numpy(golden)).abs().max() <= tolerance * max(np.abs(golden).max(), 1e-30)


@pytest.fixture(scope="module")
def backbone(shared: Path) -> Backbone:
    return load_backbone(shared / "golden" / "tiny_clip.safetensors", activation="quick_gelu")


@pytest.fixture
def golden(shared: Path):
    return lambda name: dict(np.load(shared / "golden" / f"{name}.npz"))


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)


PROJECTIONS = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "proj": "out_proj"}


def ours(name: str) -> str:
    """OpenAI's name of a low-rank parameter in the golden file -> our name."""
    tower, layer, projection, half = re.fullmatch(
        r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.(\w+)\.w_lora_([AB])", name
    ).groups()
    model = "vision_model" if tower else "text_model"
    return f"{model}.encoder.layers.{layer}.self_attn.{PROJECTIONS[projection]}.{half}"


@pytest.mark.parametrize("variant", ["qkv_both_r2", "qv_vision_r4", "qkvo_text_r3"])
def test_clip_lora(backbone, golden, variant):
    g = golden("clip_lora")
    stored = {k.removeprefix(f"{variant}/"): v for k, v in g.items() if k.startswith(f"{variant}/")}
    start = {ours(k): tensor(v) for k, v in stored.items() if re.match(r"(visual\.)?transformer\.", k)}
    rank, alpha = int(stored["r"]), float(stored["alpha"])
    towers = backbone.with_weights({})
    update = LowRank(towers.model, sorted({name[:-2] for name in start}), rank, alpha / rank**0.5)
    pairs = update.by_name()
    assert pairs.keys() == start.keys()
    with torch.no_grad():
        for name, value in start.items():
            pairs[name].copy_(value)

    def loss_of(_rows: Tensor) -> Tensor:
        with update.attached(towers.model):
            images = towers.encode_images(tensor(g["pixels"]))
            logits = 100 * images @ towers.encode_tokens(tensor(g["tokens"])).T
        if not seen:
            close(logits, stored["logits"])
        seen.append(logits)
        return cross_entropy(logits, tensor(g["labels"]))

    seen: list[Tensor] = []
    loss = loss_of(torch.arange(4))
    close(loss, stored["loss"])
    loss.backward()
    for name, value in stored.items():
        if name.startswith("grad/"):
            close(pairs[ours(name.removeprefix("grad/"))].grad, value)

    merged_model = backbone.with_weights(update.merged(backbone.model))
    with torch.no_grad():
        images = merged_model.encode_images(tensor(g["pixels"]))
        logits = 100 * images @ merged_model.encode_tokens(tensor(g["tokens"])).T
    close(logits, stored["eval/logits"] if "eval/logits" in stored else stored["logits"])

    if any(name.startswith("adamw_step1/") for name in stored):
        optimizer = torch.optim.AdamW(list(pairs.values()), lr=2e-4, weight_decay=1e-2)
        train(loss_of, optimizer, [torch.arange(4)])
        for name, value in stored.items():
            if name.startswith("adamw_step1/"):
                close(pairs[ours(name.removeprefix("adamw_step1/"))], value, 1e-3)


def test_wise_ft_interpolation(golden):
    g = golden("wise_ft")

    def model(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): tensor(v) for k, v in g.items() if k.startswith(prefix)}

    theta0, theta1 = model("toy/theta0/"), model("toy/theta1/")
    for alpha in (0.0, 0.3, 1.0):
        for name, value in interpolate(theta0, theta1, alpha).items():
            close(value, g[f"toy/alpha{alpha}/{name}"])
    fisher = model("toy/fisher0/"), model("toy/fisher1/")
    for name, value in interpolate(theta0, theta1, 0.3, fisher, float(g["toy/fisher_floor"])).items():
        close(value, g[f"toy/fisher_alpha0.3/{name}"])


def test_wise_ft_of_a_clip(backbone, golden):
    g = golden("wise_ft")
    names = {
        "visual.proj": "visual_projection.weight",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
    }
    tuned = {}
    for theirs, name in names.items():
        value = tensor(g[f"clip/finetuned/image_encoder.model.{theirs}"])
        tuned[name] = value.T if theirs == "visual.proj" else value
    original = {name: backbone.model.state_dict()[name] for name in tuned}
    with torch.no_grad():
        head0 = backbone.logit_scale * backbone.encode_tokens(tensor(g["clip/tokens"]))
    close(head0, g["clip/zero_shot_head"])
    for alpha in (0.0, 0.3, 1.0):
        model = backbone.with_weights(interpolate(original, tuned, alpha))
        head = interpolate(
            {"weight": head0, "bias": torch.zeros(5)},
            {k: tensor(g[f"clip/finetuned/classification_head.{k}"]) for k in ("weight", "bias")},
            alpha,
        )
        with torch.no_grad():
            logits = model.encode_images(tensor(g["pixels"])) @ head["weight"].T + head["bias"]
        close(logits, g[f"clip/alpha{alpha}/logits"])


def test_clip_adapter(golden):
    """The official code feeds features that are not normalised; unit features give the same logits."""
    g = golden("clip_adapter")
    w1, w2 = tensor(g["fc.0.weight"]).requires_grad_(), tensor(g["fc.2.weight"]).requires_grad_()
    features, texts = tensor(g["image_features"]), normalize(tensor(g["text_features"]), dim=1)
    scale = 1 / 0.07
    for x in (features, normalize(features, dim=1)):
        w1.grad = w2.grad = None
        logits = scale * normalize(adapt(x, w1, w2, float(g["ratio"])), dim=1) @ texts.T
        close(logits, g["logits"])
        loss = cross_entropy(logits, tensor(g["labels"]))
        close(loss, g["loss"])
        loss.backward()
        close(w1.grad, g["grad/fc.0.weight"])
        close(w2.grad, g["grad/fc.2.weight"])
    close(adapt(features, w1, w2, 1.0), g["adapter_output"])
