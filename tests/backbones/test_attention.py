"""Attention can be read, exchanged and masked per block, and a causal tower stays causal."""

from __future__ import annotations

import pytest
import torch
import transformers

from clipadapt.backbones import Backbone, Insertion
from clipadapt.errors import BackboneError
from tests.tiny import tiny


def encode(backbone: Backbone, tower: str, pixels: torch.Tensor, texts: list[str]) -> torch.Tensor:
    return backbone.encode_texts(texts) if tower == "text" else backbone.encode_images(pixels)


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_reading_maps_changes_nothing(backbone, pixels, texts, tower):
    before = encode(backbone, tower, pixels, texts)
    with backbone.attention("qk", layers=None, tower=tower) as maps:
        during = encode(backbone, tower, pixels, texts)
    torch.testing.assert_close(during, before, rtol=0, atol=1e-5)
    assert sorted(maps) == [0, 1, 2]
    for weights in maps.values():
        assert weights.shape[1] == 2
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    assert torch.equal(encode(backbone, tower, pixels, texts), before)


def test_maps_are_those_of_transformers(clip, pixels):
    model = transformers.CLIPModel.from_pretrained(tiny("clip"), attn_implementation="eager")
    expected = model.vision_model(pixels, output_attentions=True).attentions
    with clip.attention(layers=None) as maps:
        clip.encode_images(pixels)
    for layer, weights in enumerate(expected):
        torch.testing.assert_close(maps[layer], weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["vv", "qq", "kk", "qq+kk", "identity", "qk"])
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_causal_text_stays_causal_in_every_mode(clip, pixels, texts, tower, mode):
    """An attention function that transformers knows no mask for gets none: it must mask by itself."""
    with clip.attention(mode, layers=None, tower=tower) as maps:
        encode(clip, tower, pixels, texts)
    for weights in maps.values():
        above = weights.triu(1)
        assert (above == 0).all() == (tower == "text" or mode == "identity")


@pytest.mark.parametrize("mode", ["vv", "qq", "kk", "qq+kk"])
def test_padding_stays_hidden_in_every_mode(backbone, texts, mode):
    with backbone.attention(mode, layers=None, tower="text"):
        together = backbone.encode_texts(texts)
        alone = torch.cat([backbone.encode_texts([text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_value_value_attention_by_hand(clip, pixels):
    """The last block's output from its input, computed here with v in the place of q and k."""
    block = clip.blocks("vision")[-1]
    caught = []
    hook = block.register_forward_hook(lambda module, args, output: caught.append((args[0], output)))
    with clip.attention("vv"):
        clip.encode_images(pixels)
    hook.remove()
    rows, output = caught[0]  # (B, N, W)
    values = block.self_attn.v_proj(block.layer_norm1(rows)).unflatten(-1, (2, 16)).transpose(1, 2)  # (B, heads, N, C)
    weights = (values @ values.transpose(-1, -2) / 4).softmax(-1)
    hidden = rows + block.self_attn.out_proj((weights @ values).transpose(1, 2).flatten(2))
    expected = hidden + block.mlp(block.layer_norm2(hidden))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_two_pairs_are_summed_and_identity_is_itself(clip, pixels):
    maps = {}
    for mode in ("qq", "kk", "qq+kk", "identity"):
        with clip.attention(mode) as one:
            clip.encode_images(pixels)
        maps[mode] = one[2]
    torch.testing.assert_close(maps["qq+kk"], maps["qq"] + maps["kk"])
    assert torch.equal(maps["identity"], torch.eye(17).expand(3, 2, 17, 17))


def test_only_chosen_blocks_change(clip, pixels):
    caught = []
    hooks = [b.register_forward_hook(lambda module, args, output: caught.append(output)) for b in clip.blocks("vision")]
    clip.encode_images(pixels)
    with clip.attention("vv", layers=[1]) as maps:
        clip.encode_images(pixels)
    for hook in hooks:
        hook.remove()
    assert list(maps) == [1]
    assert [torch.equal(caught[i], caught[i + 3]) for i in range(3)] == [True, False, False]


def test_bias_forbids_and_carries_gradients(clip, pixels):
    forbidden = torch.zeros(1, 1, 17, 17)
    forbidden[..., 5] = -torch.inf
    with clip.attention(bias=forbidden) as maps:
        clip.encode_images(pixels)
    assert (maps[2][..., 5] == 0).all()
    bias = torch.zeros(17, requires_grad=True)
    with clip.attention(bias=bias):
        clip.encode_images(pixels).sum(0)[0].backward()
    assert bias.grad.abs().sum() > 0


def test_together_with_inserted_tokens(clip, texts):
    """Inserted rows lengthen the maps, and the causal mask with them."""
    prompt = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    with clip.inserted(text=[Insertion(prompt, layer=1, mode="insert")]):
        plain = clip.encode_texts(texts)
        with clip.attention(layers=None, tower="text") as maps:
            torch.testing.assert_close(clip.encode_texts(texts), plain, rtol=0, atol=1e-5)
    assert [maps[layer].shape[-1] - maps[0].shape[-1] for layer in range(3)] == [0, 2, 2]
    assert (maps[2].triu(1) == 0).all()


def test_nothing_remains_after_an_error(clip, pixels):
    before = clip.encode_images(pixels)
    with pytest.raises(ZeroDivisionError), clip.attention("vv", layers=None):
        raise ZeroDivisionError
    assert torch.equal(clip.encode_images(pixels), before)


def test_errors(clip, pixels):
    for mode in ("", "v", "qx", "vv+", "values"):
        with pytest.raises(BackboneError, match="Unknown attention mode"), clip.attention(mode):
            pass
    with (
        pytest.raises(BackboneError, match="Layer 3 is outside the 3 blocks of the vision tower"),
        clip.attention(layers=[3]),
    ):
        pass
