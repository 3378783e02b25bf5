"""Lasting changes of structure: each computes what it says, counts in the fingerprint, and survives what follows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipadapt.backbones import (
    AttentionMode,
    Backbone,
    DropMLP,
    DropResidual,
    Edit,
    ExtraChannels,
    InsertedModules,
    Insertion,
    LongerPositions,
    load_backbone,
)
from clipadapt.errors import BackboneError, ClipadaptError
from tests.golden import Golden, golden_backbone
from tests.tiny import tiny

SITE = "vision_model.encoder.layers.1.self_attn.out_proj"


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Bottleneck(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up = nn.Parameter(0.1 * randn(width, 2))

    def forward(self, rows: Tensor) -> Tensor:
        return rows + rows[..., :2] @ self.up.T


EDITS: dict[str, Edit] = {
    "longer": LongerPositions(40, keep=6),
    "channels": ExtraChannels(1, fill=2.0),
    "attention": AttentionMode("vv"),
    "residual": DropResidual(),
    "mlp": DropMLP(),
    "modules": InsertedModules({SITE: Bottleneck()}),
    "text attention": AttentionMode("qq", layers=None, tower="text"),
    "text mlp": DropMLP([0], tower="text"),
}


def trained(backbone: Backbone) -> Backbone:
    """Where an edit adds weights that are zero at first, others."""
    weights = backbone.weights()
    name = f"{backbone.tower('vision').pixels}.weight"
    return backbone.with_weights({name: weights[name] + 0.1 * randn(*weights[name].shape)})


@pytest.mark.parametrize("name", list(EDITS))
def test_an_edit_counts_and_survives(clip, pixels, texts, tmp_path, name):
    edit = EDITS[name]
    before, features = clip.fingerprint, clip.encode_images(pixels)
    edited = clip.edited(edit)
    assert edited.edits == (edit,)
    assert edited.fingerprint != clip.fingerprint
    assert (edited.image_fingerprint != clip.image_fingerprint) == (edit.tower == "vision")
    assert clip.edited(edit).fingerprint == edited.fingerprint
    assert not any(parameter.requires_grad for parameter in edited.model.parameters())
    if name == "channels":
        edited = trained(edited)
    long = [*texts, "a photo of the red house " * 5]
    images, sentences = edited.encode_images(pixels), edited.encode_texts(long)
    assert torch.equal(images, features) == (edit.tower == "text")
    assert torch.equal(sentences, clip.encode_texts(long)) == (edit.tower == "vision")
    factor = {"visual_projection.weight": lambda weight: weight * 2}
    for other in (edited.copy(), edited.copy().copy(), edited.with_weights({}), edited.with_weights(factor)):
        torch.testing.assert_close(other.encode_images(pixels), images, rtol=0, atol=1e-6)
        assert torch.equal(other.encode_texts(long), sentences)
        assert other.edits == (edit,)
    assert edited.copy().fingerprint == edited.fingerprint
    assert edited.with_weights(factor).fingerprint not in (edited.fingerprint, clip.with_weights(factor).fingerprint)
    if edit.plain:
        edited.save(tmp_path / "saved")
        again = load_backbone(tmp_path / "saved")
        assert (again.fingerprint, again.image_fingerprint) == (edited.fingerprint, edited.image_fingerprint)
        assert torch.equal(again.encode_images(pixels), images)
        assert torch.equal(again.encode_texts(long), sentences)
    else:
        with pytest.raises(BackboneError, match=f"cannot be saved, since .* not hold {type(edit).__name__}"):
            edited.save(tmp_path / "saved")
        assert not list(tmp_path.iterdir())
    assert clip.fingerprint == before
    assert torch.equal(clip.encode_images(pixels), features)


def test_what_is_not_changed_shares_its_memory(clip):
    edited = clip.edited(DropMLP(), LongerPositions(40, keep=4))
    mine, others = clip.weights(), edited.weights()
    assert mine.keys() == others.keys()
    differing = [name for name in mine if mine[name].data_ptr() != others[name].data_ptr()]
    assert differing == ["text_model.embeddings.position_embedding.weight"]


# -- positions --------------------------------------------------------------------------------------------------------


def test_short_texts_keep_their_features_and_long_ones_are_not_cut(clip):
    longer = clip.edited(LongerPositions(40, keep=8))
    short = ["a cat", "star", "a photo of the"]
    assert torch.equal(longer.encode_texts(short), clip.encode_texts(short))
    text = "a photo of the red house " * 5
    ids = longer.tokenize([text])
    assert (ids.shape[1], clip.tokenize([text]).shape[1]) == (32, 16)
    assert (longer.context_length, longer.tokenizer.model_max_length, clip.tokenizer.model_max_length) == (40, 40, 16)
    context = Insertion(randn(2, 24), at=1)
    encoder = longer.prompt_encoder(longer.tokenize([text, text + "star"]))
    assert "shared rows" in encoder.explain([context])
    with longer.inserted(text=[context]):
        plain = longer.encode_tokens(encoder.ids)
    torch.testing.assert_close(encoder([context]), plain, rtol=0, atol=1e-5)


def test_positions_are_stretched_as_in_long_clip(shared):
    golden, backbone = Golden(shared, "long_clip"), golden_backbone(shared)
    longer = backbone.edited(LongerPositions(248, keep=20))
    table = longer.weights()["text_model.embeddings.position_embedding.weight"]
    torch.testing.assert_close(table, golden["positional_embedding_stretched"])
    for kind in ("long", "short"):
        features = normalize(golden[f"text_features_{kind}"], dim=1)
        found = longer.encode_tokens(golden[f"tokens_{kind}"].long())
        torch.testing.assert_close(found, features, rtol=0, atol=5e-5)


def test_positions_by_hand(clip):
    """Between two old rows the straight line, behind the last one the same line on; whole ratios or not."""
    name = "text_model.embeddings.position_embedding.weight"
    old = clip.weights()[name].double()
    for length, keep in ((40, 4), (17, 0), (31, 14)):
        new = clip.edited(LongerPositions(length, keep)).weights()[name].double()
        assert torch.equal(new[:keep], old[:keep])
        for row in range(keep, length):
            place = keep + (row - keep) * (16 - keep) / (length - keep)
            below = min(int(place + 1e-9), 14)
            expected = old[below] + (place - below) * (old[below + 1] - old[below])
            torch.testing.assert_close(new[row], expected, rtol=0, atol=1e-6)


# -- channels ---------------------------------------------------------------------------------------------------------


def test_channels_of_zero_weight_change_nothing_and_take_part_afterwards(backbone, pixels):
    edited = backbone.edited(ExtraChannels(2, fill=0.5))
    more = torch.cat([pixels, randn(3, 2, 32, 32)], 1)
    torch.testing.assert_close(edited.encode_images(more), backbone.encode_images(pixels), rtol=0, atol=1e-5)
    other = trained(edited)
    filled = torch.cat([pixels, torch.full((3, 2, 32, 32), 0.5)], 1)
    assert torch.equal(other.encode_images(pixels), other.encode_images(filled))
    assert not torch.allclose(other.encode_images(more), other.encode_images(filled), atol=1e-3)
    assert edited.fingerprint != backbone.edited(ExtraChannels(2, fill=0.0)).fingerprint
    with pytest.raises(BackboneError, match=r"must be \(B, 5, H, W\), but are \(3, 4, 32, 32\)"):
        edited.encode_images(more[:, :4])


def test_a_mask_is_seen_as_in_alpha_clip(shared):
    golden, backbone = Golden(shared, "alpha_clip"), golden_backbone(shared)
    zero = backbone.edited(ExtraChannels(1, fill=(1 - 0.5) / 0.26))
    pixels, alpha = golden["pixels"], golden["alpha"]
    raw = {"normalize": False}
    both = torch.cat([pixels, alpha], 1)
    close = {"rtol": 0, "atol": 5e-5 * float(golden["image_features"].abs().max())}
    torch.testing.assert_close(zero.encode_images(both, **raw), golden["zero_init/image_features"], **close)
    name = f"{backbone.tower('vision').pixels}.weight"
    weight = torch.cat([backbone.weights()[name], golden["conv1_alpha"]], 1)
    tuned = zero.with_weights({name: weight})
    torch.testing.assert_close(tuned.encode_images(both, **raw), golden["image_features"], **close)
    torch.testing.assert_close(tuned.encode_images(pixels, **raw), golden["image_features_all_ones"], **close)


# -- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["vv", "qq+kk", "identity"])
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_a_lasting_attention_is_the_temporary_one(backbone, pixels, texts, tower, mode):
    edited = backbone.edited(AttentionMode(mode, layers=(0, -1), tower=tower))
    with backbone.attention(mode, layers=(0, -1), tower=tower):
        images, sentences = backbone.encode_images(pixels), backbone.encode_texts(texts)
    assert torch.equal(edited.encode_images(pixels), images)
    assert torch.equal(edited.encode_texts(texts), sentences)
    with edited.attention("qk", layers=None, tower=tower) as maps:  # for a while, the trained way again
        torch.testing.assert_close(edited.encode_images(pixels), backbone.encode_images(pixels), rtol=0, atol=1e-5)
        torch.testing.assert_close(edited.encode_texts(texts), backbone.encode_texts(texts), rtol=0, atol=1e-5)
    assert sorted(maps) == [0, 1, 2]
    assert torch.equal(edited.encode_images(pixels), images)


def test_blocks_without_parts_by_hand(backbone, pixels):
    """The last block's output from its input, for each part and for both."""
    seen: list[Tensor] = []
    with backbone.after_blocks("vision", {1: seen.append, 2: seen.append}):
        backbone.encode_images(pixels)
    rows, block = seen[0], backbone.blocks("vision")[2]
    attended = block.self_attn(block.layer_norm1(rows), None)[0]
    hidden = rows + attended
    both = backbone.edited(DropMLP(), DropResidual())
    assert both.fingerprint != backbone.edited(DropMLP()).fingerprint != backbone.edited(DropResidual()).fingerprint
    for edited, expected in (
        (backbone.edited(DropMLP()), hidden),
        (backbone.edited(DropResidual()), attended + block.mlp(block.layer_norm2(attended))),
        (both, attended),
    ):
        with edited.after_blocks("vision", {1: seen.append, 2: seen.append}):
            edited.encode_images(pixels)
        torch.testing.assert_close(seen[-2], rows, rtol=0, atol=1e-6)
        torch.testing.assert_close(seen[-1], expected, rtol=0, atol=1e-5)
        assert edited.weights().keys() == backbone.weights().keys()
        assert edited.target_modules() == backbone.target_modules()


@pytest.mark.parametrize(("form", "mode"), [("vanilla", None), ("SCLIP", "qq+kk"), ("ClearCLIP", "qq")])
def test_reduced_blocks_as_in_clearclip(shared, form, mode):
    golden, backbone = Golden(shared, "dense_attention"), golden_backbone(shared)
    attention = [AttentionMode(mode)] if mode else []
    full, reduced = backbone.edited(*attention), backbone.edited(*attention, DropResidual(), DropMLP())
    for edited, kind in ((full, "full"), (reduced, "reduced")):
        expected = golden[f"clearclip_repo/{form}_{kind}_native"]  # (2, N, D)
        found = edited.encode_images(golden["pixels_native"], tokens=True, normalize=False).patches
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-5 * float(expected.abs().max()))


def test_prompts_in_a_text_tower_that_lacks_a_part_go_the_plain_way(clip, texts):
    edited, context = clip.edited(DropMLP(tower="text")), Insertion(randn(2, 24), at=1)
    encoder = edited.prompt_encoder(edited.tokenize(texts))
    assert "lack a part" in encoder.explain([context])
    with edited.inserted(text=[context]):
        plain = edited.encode_tokens(encoder.ids)
    torch.testing.assert_close(encoder([context]), plain)


# -- modules ----------------------------------------------------------------------------------------------------------


def test_inserted_modules_see_what_their_site_gives(backbone, pixels):
    sites = backbone.target_modules("vision", ("o", "fc2"))
    shared = Bottleneck()
    edited = backbone.edited(InsertedModules(dict.fromkeys(sites, shared)))
    hooks = [
        backbone.model.get_submodule(site).register_forward_hook(lambda module, args, output: shared(output))
        for site in sites
    ]
    expected = backbone.encode_images(pixels)
    for hook in hooks:
        hook.remove()
    assert torch.equal(edited.encode_images(pixels), expected)
    names = {f"{site}.behind.up" for site in sites}
    assert edited.weights().keys() - backbone.weights().keys() == names
    assert len({edited.weights()[name].data_ptr() for name in names}) == 1
    first = edited.fingerprint
    with torch.no_grad():
        shared.up.zero_()  # the edit took a copy
    assert torch.equal(edited.encode_images(pixels), expected)
    other = edited.with_weights({f"{sites[0]}.behind.up": torch.zeros(32, 2)})
    assert other.fingerprint != first == edited.fingerprint
    assert edited.target_modules() == backbone.target_modules()


# -- parts and running ------------------------------------------------------------------------------------------------


def test_layer_norms_are_named(backbone):
    for tower in ("text", "vision"):
        names = backbone.layer_norms(tower)
        kinds = {name.rpartition(".")[2] for name in names}
        assert kinds == {"weight", "bias"}
        assert all(name.startswith(f"{tower}_model.") for name in names)
        assert all("norm" in name.lower() or "LN" in name for name in names)
        assert len(names) >= 2 * 2 * 3
        assert set(names) <= set(backbone.weights())
    count = sum(isinstance(module, nn.LayerNorm) for module in backbone.model.modules())
    assert len(backbone.layer_norms("text") + backbone.layer_norms("vision")) == 2 * count


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_images_resume_at_a_block(backbone, pixels, layer):
    entering: list[Tensor] = []
    hook = backbone.blocks("vision")[layer].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    plain = backbone.encode_images(pixels, normalize=False)
    hook.remove()
    ran: list[Tensor] = []
    tower = backbone.towers["vision"]
    with backbone.after_blocks("vision", dict.fromkeys(range(3), ran.append)):
        left = tower.resume(entering[0], layer)
    assert len(ran) == 3 - layer % 3
    torch.testing.assert_close(backbone.project_images(left), plain, rtol=0, atol=1e-5)


def test_texts_resume_at_a_block(backbone, texts):
    ids = backbone.tokenize(texts)
    seen: list[Tensor] = []
    with backbone.after_blocks("text", {0: seen.append, 2: seen.append}):
        backbone.encode_tokens(ids)
    tower = backbone.towers["text"]
    if backbone.family in ("altclip", "chinese_clip"):
        with pytest.raises(BackboneError, match="cannot resume, since it masks padding"):
            tower.resume(seen[0], 1)
    else:
        torch.testing.assert_close(tower.resume(seen[0], 1), seen[1], rtol=0, atol=1e-5)
    with (
        backbone.inserted(text=[Insertion(randn(1, 24), at=1)]),
        pytest.raises(BackboneError, match="cannot resume while tokens are inserted"),
    ):
        tower.resume(seen[0], 1)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_errors(clip):
    before = clip.fingerprint
    for edit, message in (
        (LongerPositions(16), "length above 16 and keep from 0 to 14, but got length 16 and keep 20"),
        (LongerPositions(40, keep=15), "keep 15"),
        (LongerPositions(40, tower="vision"), "for text towers that are causal"),
        (ExtraChannels(0), "at least one channel"),
        (AttentionMode("xx"), "Unknown attention mode 'xx'"),
        (AttentionMode("vv", layers=[3]), "Layer 3 is outside the 3 blocks"),
        (DropMLP([5]), "Layer 5 is outside the 3 blocks"),
        (InsertedModules({"nowhere": Bottleneck()}), "The vision tower has no module called 'nowhere'"),
        (InsertedModules({SITE: Bottleneck()}, tower="text"), "The text tower has no module called"),
    ):
        with pytest.raises(BackboneError, match=message):
            clip.edited(edit)
    with pytest.raises(BackboneError, match="already a module behind"):
        clip.edited(EDITS["modules"], EDITS["modules"])
    with pytest.raises(ClipadaptError, match="Unknown tower 'image'"):
        clip.edited(DropMLP(tower="image"))
    assert clip.fingerprint == before


@pytest.mark.parametrize("family", ["altclip", "chinese_clip", "siglip"])
def test_edits_that_a_text_tower_cannot_have(family):
    backbone = load_backbone(tiny(family))
    with pytest.raises(BackboneError, match="for text towers that are causal"):
        backbone.edited(LongerPositions(40))
    if family != "siglip":
        with pytest.raises(BackboneError, match="those of this text tower do not"):
            backbone.edited(DropMLP(tower="text"))
