"""Rows between blocks are read and changed as if the tower's own forward did it, and nothing remains."""

from __future__ import annotations

import pytest
import torch

from clipadapt.backbones import Insertion
from clipadapt.errors import BackboneError


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_a_change_reaches_the_features_and_its_gradient_comes_back(backbone, pixels, texts, tower):
    ids = backbone.tokenize(texts)

    def encode() -> torch.Tensor:
        return backbone.encode_tokens(ids) if tower == "text" else backbone.encode_images(pixels)

    with torch.no_grad():
        before = encode()
    seen: list[torch.Tensor] = []
    shift = torch.zeros(backbone.width(tower), requires_grad=True)
    with backbone.after_blocks(tower, {1: seen.append, 0: lambda rows: rows + shift}):
        same = encode()
    torch.testing.assert_close(same, before)
    same.sum(0)[0].backward()
    assert shift.grad.abs().sum() > 0
    assert seen[0].shape[0] == len(ids if tower == "text" else pixels)
    assert seen[0].shape[2] == backbone.width(tower)
    with backbone.after_blocks(tower, {0: lambda rows: rows + torch.randn(rows.shape[-1])}):
        assert not torch.allclose(encode(), before, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(encode(), before)


def test_rows_are_those_that_transformers_reports(clip, pixels):
    seen: dict[int, torch.Tensor] = {}
    with clip.after_blocks("vision", {j: lambda rows, j=j: seen.update({j: rows}) for j in (0, 1, -1)}):
        clip.encode_images(pixels)
    states = clip.model.vision_model(pixels, output_hidden_states=True).hidden_states  # the input, then each block
    for j, state in ((0, states[1]), (1, states[2]), (-1, states[3])):
        torch.testing.assert_close(seen[j], state)


@pytest.mark.parametrize("outside", [True, False])
def test_inserted_rows_are_among_them(clip, pixels, outside):
    """Behind the last block too, whichever of the two is entered first; a change of them is what `inserted` shows."""
    insertion = Insertion(torch.zeros(2, 32), at=-2, mode="insert")
    seen: list[torch.Tensor] = []

    def doubled(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows)
        return torch.cat([rows[:, :-2], 2 * rows[:, -2:]], 1)

    doors = [clip.after_blocks("vision", {-1: doubled}), clip.inserted(vision=[insertion])]
    first, second = doors if outside else doors[::-1]
    with first, second:
        changed = clip.encode_images(pixels, tokens=True)
    with clip.inserted(vision=[insertion]):
        plain = clip.encode_images(pixels, tokens=True)
    assert seen[0].shape == (3, 1 + 16 + 2, 32)
    torch.testing.assert_close(changed.pooled, plain.pooled)
    norm = clip.model.vision_model.post_layernorm
    torch.testing.assert_close(changed.inserted, norm(2 * seen[0][:, -2:]))


def test_a_prompt_encoder_takes_the_plain_way(clip, texts):
    encoder = clip.prompt_encoder(clip.tokenize(texts))
    assert "shared rows" in encoder.explain()
    with clip.after_blocks("text", {0: lambda rows: 2 * rows}):
        assert "read or changed between its blocks" in encoder.explain()
        with clip.after_blocks("text", {1: lambda rows: None}):
            pass
        torch.testing.assert_close(encoder(), clip.encode_texts(texts))
    assert "shared rows" in encoder.explain()


def test_errors(clip, pixels):
    with (
        pytest.raises(
            BackboneError, match=r"behind block 1 must keep their shape, but \(3, 17, 32\) became \(3, 2, 32\)"
        ),
        clip.after_blocks("vision", {1: lambda rows: rows[:, :2]}),
    ):
        clip.encode_images(pixels)
    with pytest.raises(BackboneError, match="Layer 3 is outside the 3 blocks"), clip.after_blocks("vision", {3: print}):
        pass
    assert not clip.towers["vision"].lasting
