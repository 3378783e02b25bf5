"""The convolutional trunk: batch norm folded in gives what the layers one after the other give."""

from __future__ import annotations

import pytest
import torch

from clipadapt.backbones import load_backbone
from clipadapt.backbones.trunk import LITE0, STEM, Trunk, folded
from clipadapt.errors import BackboneError
from tests.official_trunk import Official
from tests.tiny import tiny

STAGES = ((1, 3, 1, 1, 6), (2, 5, 2, 3, 8), (2, 3, 2, 2, 8))


def test_folded_weights_give_what_batch_norm_gives():
    pixels = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    official = Official(STAGES, 4, 10)
    expected = official(pixels)
    trunk = Trunk(5, STAGES, stem=4, head=10)
    trunk.layers.load_state_dict(folded(official.weights, STAGES))
    with torch.no_grad():
        torch.testing.assert_close(trunk.features(pixels), expected, rtol=0, atol=1e-5)
        assert trunk(pixels).shape == (2, 5, 4, 6)
        whole = trunk(torch.nn.functional.pad(pixels, (0, 5, 0, 3)))
        torch.testing.assert_close(whole, trunk(pixels), rtol=0, atol=1e-6)  # what exceeds the stride is not seen


def test_lite0_has_its_published_size():
    trunk = Trunk(256)
    assert trunk.stride == 32
    assert sum(parameter.numel() for parameter in trunk.layers.parameters()) == 3_350_000
    assert trunk.layers[0].out_channels == STEM
    assert len(trunk.layers) == 2 + sum(stage[0] for stage in LITE0)


def test_gradients_reach_pixels_and_the_first_layer():
    backbone = load_backbone(tiny("clip_trunk")).copy()
    weight = backbone.model.get_submodule(backbone.tower("vision").pixels).weight.requires_grad_()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    backbone.encode_images(pixels).square().sum(0)[0].backward()
    assert pixels.grad.abs().max() > 0
    assert weight.grad.abs().max() > 0


@pytest.mark.parametrize("size", [(32, 32), (40, 32), (45, 70)])
def test_any_size_is_a_grid_of_whole_patches(size):
    backbone = load_backbone(tiny("clip_trunk"))
    tokens = backbone.encode_images(torch.zeros(1, 3, *size), tokens=True)
    assert tokens.grid == (size[0] // 8, size[1] // 8)


def test_patches_stand_for_pixels():
    backbone = load_backbone(tiny("clip_trunk"))
    for size in ((32, 32), (40, 24)):
        pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        patches = backbone.encode_patches(pixels)
        assert patches.shape == (2, 32, size[0] // 8, size[1] // 8)
        plain, kept = backbone.encode_images(pixels, tokens=True), backbone.encode_images(patches, tokens=True)
        assert torch.equal(plain.pooled, kept.pooled)
        assert torch.equal(plain.patches, kept.patches)
        assert plain.grid == kept.grid
    with pytest.raises(BackboneError, match="no trunk"):
        load_backbone(tiny("clip")).encode_patches(pixels)
