"""Bottlenecks and linear adapters: their formulas, what they share, what they drop. See also test_updates.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from clipadapt.backbones import load_backbone
from clipadapt.errors import ClipadaptError
from clipadapt.nn.updates import Bottleneck, Bottlenecks, LinearAdapter, LinearAdapters, SiteUpdate
from tests.tiny import tiny


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny("clip"))


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def randomize(module: nn.Module, std: float = 0.2) -> None:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)


def sites_of(backbone) -> list[str]:
    return backbone.target_modules(kinds=("o", "fc2"))


def test_a_bottleneck_is_its_formula_and_starts_as_the_identity():
    torch.manual_seed(0)
    adapter, rows = Bottleneck(6, 2), torch.randn(4, 5, 6)
    torch.testing.assert_close(adapter(rows), rows, rtol=0, atol=0)
    randomize(adapter)
    inner = rows @ adapter.down.weight.T + adapter.down.bias
    expected = rows + gelu(inner, approximate="tanh") @ adapter.up.weight.T + adapter.up.bias
    torch.testing.assert_close(adapter(rows), expected)


@pytest.mark.parametrize("family", ["clip", "metaclip_2", "siglip", "siglip2", "altclip", "chinese_clip"])
def test_attached_to_every_family_and_nothing_left(family, pixels):
    backbone = load_backbone(tiny(family))
    fingerprint, state = backbone.fingerprint, set(backbone.model.state_dict())
    ids = backbone.tokenize(["a photo of a cat", "red dog"])
    plain = backbone.encode_images(pixels), backbone.encode_tokens(ids)
    adapters = Bottlenecks(backbone.model, sites_of(backbone), reduction=8)
    assert len(adapters.parts) == 12
    with adapters.attached(backbone.model):
        torch.testing.assert_close(backbone.encode_images(pixels), plain[0], rtol=0, atol=0)
    randomize(adapters)
    with adapters.attached(backbone.model):
        changed = backbone.encode_images(pixels), backbone.encode_tokens(ids)
        assert set(backbone.model.state_dict()) == state
    for before, after in zip(plain, changed, strict=True):
        assert (before - after).abs().max() > 0.01
    torch.testing.assert_close(backbone.encode_images(pixels), plain[0], rtol=0, atol=0)
    assert not any(m._forward_hooks for m in backbone.model.modules())
    assert backbone.fingerprint == fingerprint


def test_gradients_reach_the_adapters_only(backbone, pixels):
    adapters = Bottlenecks(backbone.model, backbone.target_modules("vision", ("o", "fc2")))
    with adapters.attached(backbone.model):
        backbone.encode_images(pixels).square().sum().backward()
        backbone.encode_images(pixels)[:, 0].sum().backward()
    assert all(part.up.weight.grad.abs().max() > 0 for part in adapters.parts)
    assert all(p.grad is None for p in backbone.model.parameters())


def test_a_site_that_gives_a_tuple_has_its_first_part_adapted():
    class Pair(nn.Module):
        def forward(self, x):
            return x, "kept"

    model = nn.Sequential(Pair())
    adapters = SiteUpdate(model, {"0": Bottleneck(4, 2)})
    randomize(adapters)
    x = torch.randn(3, 4)
    with adapters.attached(model):
        first, second = model(x)
    torch.testing.assert_close(first, adapters.at("0")(x))
    assert second == "kept"


def test_sharing_among_sites():
    model = nn.ModuleDict({"a": nn.Linear(5, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 16)})
    made = {share: Bottlenecks(model, "abc", reduction=4, share=share) for share in ("none", "down", "up", "all")}
    parts = {share: [adapters.at(site) for site in "abc"] for share, adapters in made.items()}
    a, b, c = parts["none"]
    assert a.down is not b.down
    assert a.up is not b.up
    for share in ("down", "up"):
        a, b, c = parts[share]
        assert (a.down is b.down) == (share == "down")
        assert (a.up is b.up) == (share == "up")
    a, b, c = parts["all"]
    assert a is b
    assert c is not a, "widths differ"
    one, wide = 8 * 2 + 2 + 2 * 8 + 8, 16 * 4 + 4 + 4 * 16 + 16
    down, up = 8 * 2 + 2, 2 * 8 + 8
    counts = {share: sum(p.numel() for p in adapters.parameters()) for share, adapters in made.items()}
    assert counts == {
        "none": 2 * one + wide,
        "down": down + 2 * up + wide,
        "up": 2 * down + up + wide,
        "all": one + wide,
    }


def test_one_adapter_for_layers_and_towers_is_trained_as_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapters = Bottlenecks(model, ["0", "1"], reduction=2, share="all")
    x = torch.randn(3, 4)
    with adapters.attached(model):
        y = model(x)
    shared = adapters.at("0")
    torch.testing.assert_close(y, shared(model[1](shared(model[0](x)))))
    assert len(list(adapters.parameters())) == 4


@pytest.mark.parametrize("within", ["none", "down", "up", "all"])
@pytest.mark.parametrize("share", ["none", "down", "up", "all"])
def test_sharing_among_tasks(within, share):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first = Bottlenecks(model, ["0", "1"], reduction=2, share=within)
    second = first.for_another_task(share)
    assert (second is first) == (share == "all")
    for site in ("0", "1"):
        assert (second.at(site).down is first.at(site).down) == (share in ("down", "all"))
        assert (second.at(site).up is first.at(site).up) == (share in ("up", "all"))
    for half, others in (("down", ("down", "all")), ("up", ("up", "all"))):
        assert (getattr(second.at("0"), half) is getattr(second.at("1"), half)) == (within in others), (
            "as it is within a task"
        )
    x = torch.randn(2, 4)
    if share in ("none", "down"):
        with second.attached(model):
            torch.testing.assert_close(model(x), model[1](model[0](x)), msg="a new up-projection is zero")


@pytest.mark.parametrize("share", ["none", "down", "up", "all"])
def test_shared_parts_are_kept_once_and_restored(backbone, pixels, share):
    sites = backbone.target_modules("vision", ("o", "fc2"))
    adapters = Bottlenecks(backbone.model, sites, share=share)
    randomize(adapters)
    kept = adapters.tensors()
    assert sum(t.numel() for t in kept.values()) == adapters.count
    again = Bottlenecks.restore(kept, backbone.model, sites, share=share)
    first, second = (again.at(site) for site in sites[:2])
    assert (first.down is second.down) == (share in ("down", "all"))
    assert (first.up is second.up) == (share in ("up", "all"))
    features = []
    for one in (adapters, again):
        with one.attached(backbone.model):
            features.append(backbone.encode_images(pixels))
    torch.testing.assert_close(*features, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [None, 2, 100])
def test_a_linear_adapter_merges(backbone, pixels, rank):
    sites = sites_of(backbone)
    torch.manual_seed(0)
    adapters = LinearAdapters(backbone.model, sites, rank, scale=0.7, drop=0.5).eval()
    plain = backbone.encode_images(pixels)
    with adapters.attached(backbone.model):
        torch.testing.assert_close(backbone.encode_images(pixels), plain, rtol=0, atol=0)
    randomize(adapters, std=0.1)
    with adapters.attached(backbone.model):
        attached = backbone.encode_images(pixels), backbone.encode_texts(["a cat"])
    assert (attached[0] - plain).abs().max() > 1e-3
    weights = adapters.merged(backbone.model)
    assert set(weights) == {f"{site}.{kind}" for site in sites for kind in ("weight", "bias")}
    other = backbone.copy()
    other.model.load_state_dict(weights, strict=False)
    for one, expected in zip((other.encode_images(pixels), other.encode_texts(["a cat"])), attached, strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-5)
    state = backbone.model.state_dict()
    for name, tensor in adapters.merged(backbone.model, 0.0).items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
    half = adapters.merged(backbone.model, 0.5)
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, (state[name] + weights[name]) / 2)


def test_dropping_is_by_example_and_keeps_the_mean():
    torch.manual_seed(0)
    adapter = LinearAdapter(3, 1, scale=1.0, drop=0.25)
    randomize(adapter, std=1.0)
    rows = torch.randn(1, 2, 3).expand(4000, 2, 3)
    full = adapter.eval()(rows[:1]) - rows[:1]  # (1, 2, 3)
    change = adapter.train()(rows) - rows
    dropped = change.flatten(1).abs().sum(1) == 0
    torch.testing.assert_close(change[~dropped], (full / 0.75).expand_as(change[~dropped]))
    assert abs(dropped.float().mean().item() - 0.25) < 0.03


def test_bad_input(backbone):
    with pytest.raises(ClipadaptError, match=r"no module called 'vision_model\.nothing'"):
        Bottlenecks(backbone.model, ["vision_model.nothing"])
    with pytest.raises(ClipadaptError, match="share"):
        Bottlenecks(backbone.model, sites_of(backbone), share="half")
    with pytest.raises(ClipadaptError, match="at least one site"):
        Bottlenecks(backbone.model, [])
    other = Bottlenecks(nn.Sequential(nn.Linear(2, 2)), ["0"])
    with pytest.raises(ClipadaptError, match="no module called"), other.attached(nn.ReLU()):
        pass
