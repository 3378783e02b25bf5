"""VPT: the official prompted image features (of the PromptSRC figures), a plain computation, and fixed class texts."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, layer_norm, normalize

from clipadapt.backbones import load_backbone
from clipadapt.features import encode_classes
from clipadapt.methods import create
from clipadapt.methods.kinds.prompts import Batch
from tests.golden import NAMES, Golden, assert_close, golden_backbone
from tests.images import colours
from tests.learners import bound
from tests.methods.prompt_learning.test_golden_promptsrc import VARIANTS, parameter_names
from tests.tiny import tiny_clip


def plain_tower(weights: dict[str, Tensor], pixels: Tensor, prompts: list[Tensor], heads: int = 3) -> Tensor:
    """Unit image features (B, D), written out; prompts stand in front of the patches, as the paper puts them."""
    w = {k.removeprefix("visual."): v for k, v in weights.items() if k.startswith("visual.")}

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    batch, n = len(pixels), len(prompts[0])
    patches = torch.nn.functional.conv2d(pixels, w["conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(batch, 1, -1), patches], 1) + w["positional_embedding"]
    x = norm(torch.cat([x[:, :1], prompts[0].expand(batch, -1, -1), x[:, 1:]], 1), "ln_pre")
    for j in range(3):
        block = f"transformer.resblocks.{j}"
        if 0 < j < len(prompts):
            x = torch.cat([x[:, :1], prompts[j].expand(batch, -1, -1), x[:, 1 + n :]], 1)
        rows = norm(x, f"{block}.ln_1") @ w[f"{block}.attn.in_proj_weight"].T + w[f"{block}.attn.in_proj_bias"]
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in rows.chunk(3, -1))
        attended = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + attended.transpose(1, 2).flatten(2) @ w[f"{block}.attn.out_proj.weight"].T
        x = x + w[f"{block}.attn.out_proj.bias"]
        hidden = norm(x, f"{block}.ln_2") @ w[f"{block}.mlp.c_fc.weight"].T + w[f"{block}.mlp.c_fc.bias"]
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        x = x + hidden @ w[f"{block}.mlp.c_proj.weight"].T + w[f"{block}.mlp.c_proj.bias"]
    return normalize(norm(x[:, 0], "ln_post") @ w["proj"], dim=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_loss_and_gradients(shared, variant):
    golden, backbone = Golden(shared, "promptsrc", variant), golden_backbone(shared)
    visual = [golden[name] for name in parameter_names(golden) if name.startswith("visual")]
    classes = encode_classes(backbone, NAMES, "a photo of a {}.")
    start = {f"visual.{j}": tokens for j, tokens in enumerate(visual)}
    settings = {"n_ctx": len(visual[0]), "depth": len(visual), "templates": "a photo of a {}."}
    learner = bound("vpt", backbone, NAMES, start, **settings)
    batch = Batch(torch.arange(4), golden["labels"], None, golden["pixels"])
    assert_close(learner.seen(batch), golden["image_features_normalized"])
    loss, hits = learner.loss(batch)
    loss.backward()

    leaves = [tokens.clone().requires_grad_() for tokens in visual]
    weights = load_file(shared / "golden" / "tiny_clip.safetensors")
    images = plain_tower(weights, golden["pixels"], leaves)
    assert_close(images, golden["image_features_normalized"])
    logits = weights["logit_scale"].exp() * images @ classes.T
    expected = cross_entropy(logits, golden["labels"])
    expected.backward()
    assert_close(loss, expected.detach())
    assert torch.equal(hits, logits.argmax(1) == golden["labels"])
    for ours, plain in zip(learner.parameters(), leaves, strict=True):
        assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize(("depth", "blocks"), [(1, 1), (2, 2), (12, 3)])
def test_depth_and_what_is_kept(depth, blocks):
    backbone, support = load_backbone(tiny_clip()), colours(2, seed=1)
    setting = {"n_ctx": 4, "epochs": 1, "min_scale": 1.0, "templates": "a {}."}
    model = create("vpt", depth=depth, **setting).fit(backbone, support)
    assert {k: tuple(v.shape) for k, v in model.learned_.items()} == {f"visual.{j}": (4, 32) for j in range(blocks)}
    assert model.trained_parameters == 4 * 32 * blocks
    classes = encode_classes(backbone, support.class_names, "a {}.")
    torch.testing.assert_close(model._texts, classes, rtol=0, atol=0)
    new = model.with_classes(["star", "circle", "house"])
    torch.testing.assert_close(new._texts, encode_classes(backbone, new.class_names_, "a {}."), rtol=0, atol=0)
    assert new.predict_proba(support).shape == (8, 3)
