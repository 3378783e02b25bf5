"""A model with other weights shares what it can and computes, to the bit, what a copy with them loaded would."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from clipadapt.backbones import Backbone, Insertion, load_backbone
from clipadapt.backbones.weights import (
    own_copy,
    read_through,
    replace_weights,
    shared_copy,
    state,
    weight_names,
    weight_of,
)
from clipadapt.errors import BackboneError

Q = "vision_model.encoder.layers.1.self_attn.q_proj.weight"
K = "text_model.encoder.layers.0.self_attn.k_proj.weight"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class LowRank(nn.Module):
    """weight + up @ down"""

    def __init__(self, weight: Tensor, seed: int = 0) -> None:
        super().__init__()
        self.down = nn.Parameter(randn(2, weight.shape[1], seed=seed))
        self.up = nn.Parameter(randn(weight.shape[0], 2, seed=seed + 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def loaded(backbone: Backbone, weights: dict[str, Tensor]) -> Backbone:
    """The plain way: a whole copy, into which they are loaded."""
    other = backbone.copy()
    other.model.load_state_dict(weights, strict=False)
    return other


def changes(backbone: Backbone) -> dict[str, Tensor]:
    """Other values for weights of many kinds: matrices, biases, tables, single vectors, the scale."""
    wanted = [*backbone.target_modules(kinds=("q", "fc2"), layers=(0, -1))]
    names = [f"{name}.{kind}" for name in wanted for kind in ("weight", "bias")]
    names += ["logit_scale", "vision_model.embeddings.position_embedding.weight"]
    names += [name for name in backbone.weights() if name.endswith(("class_embedding", "probe", "in_proj_weight"))]
    return {name: backbone.weights()[name] * 1.1 for name in names}


def equal(one: Backbone, other: Backbone, pixels: Tensor, texts: list[str]) -> bool:
    images = torch.equal(one.encode_images(pixels), other.encode_images(pixels))
    return images and torch.equal(one.encode_texts(texts), other.encode_texts(texts))


@pytest.mark.parametrize("lazy", [False, True])
def test_equals_a_copy_with_the_weights_loaded(backbone, pixels, texts, tmp_path, lazy):
    weights = changes(backbone)
    before, features = backbone.fingerprint, backbone.encode_images(pixels)
    given = {name: (lambda old: old * 1.1) for name in weights} if lazy else weights
    other, plain = backbone.with_weights(given), loaded(backbone, weights)
    assert equal(other, plain, pixels, texts)
    assert other.logit_scale == plain.logit_scale != backbone.logit_scale
    assert (other.fingerprint, other.image_fingerprint) == (plain.fingerprint, plain.image_fingerprint)
    assert other.target_modules() == plain.target_modules()
    for found in (other.weights(), other.model.state_dict()):
        assert found.keys() == plain.weights().keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in plain.weights().items())
    assert not any(parameter.requires_grad for parameter in other.model.parameters())
    copied = other.copy()
    assert [name for name, _ in copied.model.named_parameters()] == [n for n, _ in plain.model.named_parameters()]
    assert equal(copied, plain, pixels, texts)
    other.save(tmp_path / "saved")
    again = load_backbone(tmp_path / "saved")
    assert again.fingerprint == plain.fingerprint
    assert equal(again, plain, pixels, texts)
    assert backbone.fingerprint == before
    assert torch.equal(backbone.encode_images(pixels), features)


def test_memory_is_shared_except_for_the_weights_given(clip):
    new = clip.weights()[Q] + 1
    other = clip.with_weights({Q: new, K: lambda old: old + 1})
    mine, others = dict(clip.model.named_parameters()), dict(other.model.named_parameters())
    assert mine.keys() - others.keys() == {K}
    differing = [name for name in others if others[name].data_ptr() != mine[name].data_ptr()]
    assert differing == [Q]
    assert others[Q].data_ptr() == new.data_ptr()
    assert others[Q] is not new
    others["visual_projection.weight"].requires_grad_()
    assert not mine["visual_projection.weight"].requires_grad
    copied = dict(clip.copy().model.named_parameters())
    assert not {p.data_ptr() for p in copied.values()} & {p.data_ptr() for p in mine.values()}


def test_prompts_attention_and_sharing_of_prefixes_work_as_with_plain_weights(clip, pixels, texts):
    update = LowRank(clip.weights()[Q])
    other = clip.with_weights({Q: update, K: lambda old: old * 2})
    plain = loaded(clip, {Q: update(clip.weights()[Q]).detach(), K: clip.weights()[K] * 2})
    ids, context = clip.tokenize(texts), Insertion(randn(2, 24), at=1)
    for one in (other, plain):
        with one.inserted(text=[context], vision=[Insertion(randn(1, 32), at=-1, mode="insert")]):
            prompted = one.encode_tokens(ids), one.encode_images(pixels)
        with one.attention("vv", layers=None) as maps:
            attended = one.encode_images(pixels)
        encoder = one.prompt_encoder(ids)
        assert "shared rows" in encoder.explain([context])
        found = [*prompted, attended, *maps.values(), encoder([context])]
        if one is other:
            first = found
    assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


def test_functions_are_called_at_each_use_and_carry_gradients(clip, pixels):
    update = LowRank(clip.weights()[Q])
    other = clip.with_weights({Q: update})
    before = other.encode_images(pixels)
    before.sum().backward()
    assert update.up.grad is not None
    first = other.fingerprint
    with torch.no_grad():
        update.up.zero_()
    assert torch.equal(other.encode_images(pixels), clip.encode_images(pixels))
    assert first != other.fingerprint == clip.fingerprint  # the factors of a module are watched


def test_one_after_the_other(clip, pixels, texts):
    """Functions pile up; a tensor ends them; a copy is free of them."""
    twice = clip.with_weights({Q: lambda old: old * 2, K: lambda old: old * 2}).with_weights({Q: lambda old: old + 1})
    assert torch.equal(twice.weights()[Q], clip.weights()[Q] * 2 + 1)
    back = twice.with_weights({Q: clip.weights()[Q]})
    assert torch.equal(back.weights()[K], clip.weights()[K] * 2)
    assert torch.equal(back.encode_images(pixels), clip.encode_images(pixels))
    assert torch.equal(twice.weights()[Q], clip.weights()[Q] * 2 + 1)  # what was made first is as it was
    back.model.get_submodule(K.removesuffix(".weight")).weight = nn.Parameter(clip.weights()[K] * 3)
    assert torch.equal(back.weights()[K], clip.weights()[K] * 3)  # and so does an assignment
    whole = back.with_weights({K: clip.weights()[K]})
    assert whole.fingerprint == clip.fingerprint
    twice.model.load_state_dict(clip.model.state_dict())  # into the shared memory, which holds the same
    assert equal(twice, clip, pixels, texts)


def test_two_of_them_encode_at_once(clip, pixels):
    adapted = [clip.with_weights({Q: LowRank(clip.weights()[Q], seed)}) for seed in range(4)]
    with torch.no_grad():
        alone = [one.encode_images(pixels) for one in adapted]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                together = list(pool.map(lambda one: one.encode_images(pixels), adapted))
                assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not torch.equal(alone[0], alone[1])


def test_moving_moves_what_is_made_at_each_use(clip, pixels):
    update = LowRank(clip.weights()[Q])
    other = clip.with_weights({Q: update}).to(torch.float64)
    assert {update.up.dtype, other.weights()[Q].dtype, other.encode_images(pixels).dtype} == {torch.float64}
    assert clip.encode_images(pixels).dtype == torch.float32


def test_errors(clip):
    for given in (torch.zeros(1), lambda old: old):
        with pytest.raises(BackboneError, match=r"clip has no weight called 'vision_model\.nothing'\."):
            clip.with_weights({"vision_model.nothing": given})
    for given in (torch.zeros(32, 8), lambda old: old[:, :8]):
        with pytest.raises(
            BackboneError, match=r"'vision_model.*q_proj\.weight' of .* shape \(32, 32\), not \(32, 8\)"
        ):
            clip.with_weights({Q: given})
    with pytest.raises(BackboneError, match="not NoneType"):
        clip.with_weights({Q: lambda old: None})
    with pytest.raises(BackboneError, match="position_ids"):  # no weight: it is made, not loaded
        clip.with_weights({"text_model.embeddings.position_ids": torch.zeros(1, 16)})


def test_a_weight_with_two_names_is_replaced_under_both():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    for given in (torch.eye(3), lambda old: torch.eye(3)):
        other = shared_copy(tied)
        replace_weights(other, {"1.weight": given}, "a model")
        assert torch.equal(state(other)["0.weight"], torch.eye(3))
        assert torch.equal(state(other)["1.weight"], torch.eye(3))
    assert not torch.equal(tied[0].weight, torch.eye(3))


def test_functions_of_a_weight_with_two_names_pile_up_under_both():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    before = tied[0].weight.detach().clone()
    other = shared_copy(tied)
    replace_weights(other, {"0.weight": lambda old: 2 * old}, "a model")
    again = shared_copy(other)
    replace_weights(again, {"1.weight": lambda old: old + 1}, "a model")
    for model, expected in ((tied, before), (other, 2 * before), (again, 2 * before + 1)):
        assert all(torch.equal(state(model)[name], expected) for name in ("0.weight", "1.weight"))
    assert weight_names(again) == weight_names(tied) == [name for name, _ in tied.named_parameters()]
    with read_through(again, {"1.weight": lambda old: old * 3}):
        assert torch.equal(again[0].weight, (2 * before + 1) * 3)
        assert torch.equal(state(again)["0.weight"], weight_of(again, "0.weight")), "what it holds stays"
    assert torch.equal(again[0].weight, 2 * before + 1)
    whole = own_copy(again)
    assert whole[0].weight is whole[1].weight
