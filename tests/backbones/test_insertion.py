"""Token insertion reproduces the published prompt learners' own figures, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from clipadapt.backbones import Backbone, Insertion, load_backbone
from clipadapt.errors import BackboneError

TOLERANCE = 5e-5  # of the largest value, as the golden figures' README says


class Golden:
    """The arrays of one golden file, as tensors."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.arrays, self.prefix = np.load(path), prefix

    def __getitem__(self, name: str) -> torch.Tensor:
        key = self.prefix + name
        return torch.from_numpy(self.arrays[key if key in self.arrays else name])


def assert_close(ours: torch.Tensor, golden: torch.Tensor) -> None:
    assert ours.shape == golden.shape
    assert (ours - golden).abs().max() <= TOLERANCE * golden.abs().max()


@pytest.fixture
def golden_clip(golden: Path) -> Backbone:
    return load_backbone(golden / "tiny_clip.safetensors", activation="quick_gelu")


@pytest.mark.parametrize("kind", ["unified", "csc"])
@pytest.mark.parametrize("place", ["end", "middle", "front"])
def test_coop(golden, golden_clip, place, kind):
    values = Golden(golden / "coop.npz", f"{place}_{kind}/")
    ctx = values["ctx"].requires_grad_()
    count = ctx.shape[-2]
    before = {"end": count, "middle": count // 2, "front": 0}[place]
    ids, rows = values["tokenized_prompts"].clone(), []
    for one, length in zip(ids, (values["class_tokens"] >= 0).sum(1).tolist(), strict=True):
        words, name = one[1 : 1 + count].clone(), one[1 + count : 1 + count + length].clone()
        one[1 : 1 + count + length] = torch.cat([words[:before], name, words[before:]])
        rows.append([1 + i + (length if i >= before else 0) for i in range(count)])
    with golden_clip.inserted(text=[Insertion(ctx, at=torch.tensor(rows))]):
        texts = golden_clip.encode_tokens(ids, normalize=False)
    images = golden_clip.encode_images(values["pixels"])
    logits = golden_clip.logit_scale * images @ normalize(texts, dim=-1).T
    cross_entropy(logits, values["labels"]).backward()
    assert_close(texts, values["text_features"])
    assert_close(logits, values["logits"])
    assert_close(ctx.grad, values["grad_ctx"])


def test_cocoop(golden, golden_clip):
    """One context for each picture: pictures times classes are one batch of texts."""
    values = Golden(golden / "cocoop.npz")
    ids = values["tokenized_prompts"]
    contexts = values["ctx"] + values["meta_bias"][:, None]  # (B, n, W)
    pictures, classes = len(contexts), len(ids)
    with golden_clip.inserted(text=[Insertion(contexts.repeat_interleave(classes, 0))]):
        texts = golden_clip.encode_tokens(ids.repeat(pictures, 1), normalize=False)
    assert_close(texts.reshape(pictures, classes, -1), values["text_features"])


def deep_prompts(first: torch.Tensor, later: list[torch.Tensor], at: int, mode: str) -> list[Insertion]:
    return [Insertion(first, at, mode=mode), *(Insertion(p, at, layer=j) for j, p in enumerate(later, start=1))]


@pytest.mark.parametrize("variant", ["depth1_ctx2", "depth2_ctx2", "depth3_ctx3", "depth3_ctx2_words"])
def test_maple(golden, golden_clip, variant):
    values = Golden(golden / "maple.npz", f"{variant}/")
    depth, count = int(values["depth"]), int(values["n_ctx"])
    ctx = values["ctx"].requires_grad_()
    visual = [values[f"visual_prompt_{j}"] for j in range(depth)]
    textual = [values[f"compound_prompts_text.{j}"] for j in range(depth - 1)]
    visual[0] = ctx @ values["proj.weight"].T + values["proj.bias"]
    with golden_clip.inserted(
        text=deep_prompts(ctx, textual, 1, "replace"), vision=deep_prompts(visual[0], visual[1:], -count, "insert")
    ):
        texts = golden_clip.encode_tokens(values["tokenized_prompts"], normalize=False)
        images = golden_clip.encode_images(values["pixels"], normalize=False)
    assert_close(texts, values["text_features"])
    assert_close(images, values["image_features"])
    logits = golden_clip.logit_scale * normalize(images, dim=-1) @ normalize(texts, dim=-1).T
    cross_entropy(logits, values["labels"]).backward()
    assert_close(ctx.grad, values["grad/ctx"])


@pytest.mark.parametrize("variant", ["shallow", "deep", "deep_words"])
def test_promptsrc(golden, golden_clip, variant):
    values = Golden(golden / "promptsrc.npz", f"{variant}/")
    name = "transformer.resblocks.{}.VPT_shallow"
    visual = [values[f"visual.{name}".format(j)] for j in range(1, int(values["depth_vision"]))]
    textual = [values[name.format(j)] for j in range(1, int(values["depth_text"]))]
    count = int(values["n_ctx_vision"])
    with golden_clip.inserted(
        text=deep_prompts(values["ctx"], textual, 1, "replace"),
        vision=deep_prompts(values["visual.VPT"], visual, -count, "insert"),
    ):
        texts, images = (
            golden_clip.encode_tokens(values["tokenized_prompts"]),
            golden_clip.encode_images(values["pixels"]),
        )
    assert_close(texts, values["text_features_normalized"])
    assert_close(images, values["image_features_normalized"])


@pytest.mark.parametrize("variant", ["layers23", "layers123"])
def test_mmrl(golden, golden_clip, variant):
    """Rows inserted in the middle of both towers: the causal mask and the end token's place move with them."""
    values = Golden(golden / "mmrl.npz", f"{variant}/")

    def projected(tower: str) -> list[Insertion]:
        insertions = []
        for j, layer in enumerate(values["layers"].tolist()):  # counted from 1
            weight, bias = (values[f"compound_rep_tokens_r2{tower}proj.{j}.{part}"] for part in ("weight", "bias"))
            tokens = values["compound_rep_tokens"] @ weight.T + bias
            insertions.append(Insertion(tokens, at=1, layer=layer - 1, mode="replace" if j else "insert"))
        return insertions

    with golden_clip.inserted(text=projected("t"), vision=projected("v")):
        texts = golden_clip.encode_tokens(values["tokenized_prompts"])
        images = golden_clip.encode_images(values["pixels"], tokens=True)
    assert_close(texts, values["text_features_normalized"])
    assert_close(images.pooled, values["image_features_normalized"])
    assert images.patches.shape == (4, 16, 32)
    assert images.inserted.shape == (4, values["compound_rep_tokens"].shape[0], 192)
    rep = normalize(images.inserted.mean(1) @ values["visual.proj_rep"], dim=-1)
    assert_close(100 * rep @ texts.T, values["logits_rep"])


@pytest.mark.parametrize("variant", ["OxfordPets", "Caltech101"])
def test_tcp(golden, golden_clip, variant):
    """Rows of each class replaced once more before a later block."""
    values = Golden(golden / "tcp.npz", f"{variant}/")
    teacher = golden_clip.encode_tokens(values["teacher_tokens"])  # (C, D)
    hidden = teacher @ values["meta_net.linear1.weight"].T + values["meta_net.linear1.bias"]
    hidden = hidden * torch.sigmoid(1.702 * hidden)
    prompts = hidden @ values["meta_net.linear2.weight"].T + values["meta_net.linear2.bias"]
    class_prompts = prompts.reshape(len(teacher), 4, -1)  # (C, 4, W)
    with golden_clip.inserted(text=[Insertion(values["ctx"]), Insertion(class_prompts, layer=int(values["layer"]))]):
        texts = golden_clip.encode_tokens(values["tokenized_prompts"])
    logits = golden_clip.logit_scale * golden_clip.encode_images(values["pixels"]) @ texts.T
    assert_close(logits, values["logits"])


# -- every family ------------------------------------------------------------------------------------------------------


def tokens(backbone: Backbone, tower: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, backbone.width(tower), generator=torch.Generator().manual_seed(2))


def test_replacing_word_vectors_by_themselves_changes_nothing(backbone, texts):
    ids = backbone.tokenize(texts[:1])
    with backbone.inserted(text=[Insertion(backbone.embed_tokens(ids)[:, 1:3], at=1)]):
        again = backbone.encode_tokens(ids)
    torch.testing.assert_close(again, backbone.encode_tokens(ids))


@pytest.mark.parametrize("layer", ["input", 0, 2])
@pytest.mark.parametrize("mode", ["replace", "insert"])
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_gradients_reach_the_tokens_and_nothing_remains(backbone, pixels, texts, tower, mode, layer):
    ids = backbone.tokenize(texts)
    prompt = tokens(backbone, tower, 2).requires_grad_()

    def encode() -> torch.Tensor:
        return backbone.encode_tokens(ids) if tower == "text" else backbone.encode_images(pixels)

    with torch.no_grad():
        before = encode()
    with backbone.inserted(**{tower: [Insertion(prompt, at=1, layer=layer, mode=mode)]}):
        changed = encode()
    assert not torch.allclose(changed, before)
    changed.sum(0)[0].backward()
    assert prompt.grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(encode(), before)


def test_padding_stays_hidden_beside_inserted_rows(backbone, texts):
    """A short text must not notice how long its neighbours are, with tokens in the middle of the sequence either."""
    with backbone.inserted(text=[Insertion(tokens(backbone, "text", 2), at=1, layer=1, mode="insert")]):
        together = backbone.encode_texts(texts)
        alone = torch.cat([backbone.encode_texts([text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_one_set_of_tokens_for_each_picture(clip, pixels):
    prompt = tokens(clip, "vision", 3, 2)
    with clip.inserted(vision=[Insertion(prompt, at=-2, mode="insert")]):
        together = clip.encode_images(pixels)
    for one, picture, feature in zip(prompt, pixels, together, strict=True):
        with clip.inserted(vision=[Insertion(one, at=-2, mode="insert")]):
            torch.testing.assert_close(clip.encode_images(picture[None])[0], feature)


def test_insertion_follows_larger_pictures(clip):
    large = torch.randn(1, 3, 40, 48, generator=torch.Generator().manual_seed(3))
    with clip.inserted(vision=[Insertion(tokens(clip, "vision", 2), at=-2, mode="insert")]):
        out = clip.encode_images(large, tokens=True)
    assert (out.grid, out.patches.shape[1], out.inserted.shape[1]) == ((5, 6), 30, 2)


def test_nothing_remains_after_an_error(clip, texts):
    before = clip.encode_texts(texts)
    with pytest.raises(ZeroDivisionError), clip.inserted(text=[Insertion(tokens(clip, "text", 1))]):
        raise ZeroDivisionError
    assert torch.equal(clip.encode_texts(texts), before)
    wrong = Insertion(tokens(clip, "text", 2, 1))  # two sets for four texts
    with pytest.raises(BackboneError, match="batch of 2 were put into a batch of 4"), clip.inserted(text=[wrong]):
        clip.encode_texts(texts)
    assert torch.equal(clip.encode_texts(texts), before)


def test_errors(clip, pixels):
    good = tokens(clip, "vision", 2)
    cases = [
        (Insertion(torch.zeros(2, 7)), r"must be \(n, 32\) or \(B, n, 32\), but are \(2, 7\)"),
        (Insertion(good, layer=3), r'layer must be "input" or 0..2, but is 3'),
        (Insertion(good, mode="append"), 'must be "replace" or "insert"'),
        (Insertion(good, at=torch.tensor([1, 2]), mode="insert"), "inserted at one row"),
        (Insertion(good, at=16), "2 tokens at row 16 do not fit into a sequence of 17 rows"),
        (Insertion(good, at=-1), "2 tokens at row -1 do not fit"),
    ]
    for insertion, message in cases:
        with pytest.raises(BackboneError, match=message), clip.inserted(vision=[insertion]):
            clip.encode_images(pixels)
    with (
        pytest.raises(BackboneError, match="counted from the start"),
        clip.inserted(text=[Insertion(tokens(clip, "text", 1), at=-1)]),
    ):
        pass
    twice = [Insertion(good)]
    with (
        clip.inserted(vision=twice),
        pytest.raises(BackboneError, match="already inserted"),
        clip.inserted(vision=twice),
    ):
        pass
