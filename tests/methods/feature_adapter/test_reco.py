"""RECO: its pieces computed plainly, its limits, and that a memory brings what the support set lacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

import clipadapt
from clipadapt.backbones import load_backbone
from clipadapt.errors import ClipadaptError
from clipadapt.methods import Support, create
from clipadapt.methods.feature_adapter.reco import Fusion, left_out, loss_of, neighbours
from clipadapt.training.loop import seeded
from tests.images import colours
from tests.tiny import tiny_clip


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


def random(*shape: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_fusion_is_the_first_row_of_a_transformer_layer():
    x, found = random(5, 16, seed=1), random(5, 3, 16, seed=2)
    with seeded(0):
        fusion = Fusion(16, 4, start=0.5)
        for p in fusion.parameters():  # other values than those at the start, which hide mistakes
            nn.init.normal_(p, std=0.3)
    layer = nn.TransformerEncoderLayer(16, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    parts = {"linear1": fusion.up, "linear2": fusion.down, "norm1": fusion.before, "norm2": fusion.between}
    values = {f"{name}.{kind}": p for name, part in parts.items() for kind, p in part.named_parameters()}
    values |= {f"self_attn.out_proj.{kind}": p for kind, p in fusion.out.named_parameters()}
    qkv = (fusion.q, fusion.k, fusion.v)
    values["self_attn.in_proj_weight"] = torch.cat([part.weight for part in qkv])
    values["self_attn.in_proj_bias"] = torch.cat([part.bias for part in qkv])
    layer.load_state_dict(values)
    expected = normalize(layer(torch.cat([x[:, None], found], dim=1))[:, 0], dim=1)
    torch.testing.assert_close(fusion(x, found), expected)


def test_the_start_is_clip_or_an_average():
    x, found = random(5, 16, seed=1), random(5, 3, 16, seed=2)
    with seeded(0):
        torch.testing.assert_close(Fusion(16, 8, start=0.0)(x, found), x)
        fused = Fusion(16, 8, start=0.7)(x, found)
    rows = torch.cat([x[:, None], found], dim=1)
    centred = rows - rows.mean(dim=2, keepdim=True)
    normed = centred / centred.std(dim=2, correction=0, keepdim=True) / 4
    torch.testing.assert_close(fused, normalize(x + 0.7 * normed.mean(dim=1), dim=1), atol=1e-3, rtol=1e-3)
    assert torch.equal(Fusion(16, 8, start=0.7)(x, found[:, :0]), x)


def test_an_own_image_is_left_out():
    rows = torch.tensor([[4, 0, 2], [1, 3, 5], [2, 9, 7]])
    assert left_out(rows, torch.tensor([0, 8, 2])).tolist() == [[4, 2], [1, 3], [9, 7]]


def test_neighbours_of_a_support_set():
    images, texts = random(9, 6, seed=1), random(3, 6, seed=2)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2])  # the last class has one image
    support = Support(images, labels, texts, 10.0)
    near, own, classes = neighbours(support, images, texts[labels], 3, own=True)
    assert near.shape == own.shape == (9, 3)
    for i in range(8):
        best = (images @ images[i]).argsort(descending=True).tolist()
        assert near[i].tolist() == [j for j in best if j != i][:3]
        assert i not in own[i]
    assert near[8, 0] == own[8, 0] == 8
    assert classes[:, 0].tolist() == [0, 3, 8]
    assert classes[0].tolist() == [0, 1, 2]
    near, own, _ = neighbours(support, images, texts[labels], 3, own=False)
    assert own is None
    assert near[:, 0].tolist() == list(range(9))


def test_the_loss_pairs_originals_with_refined_ones():
    v, v2, own2 = random(4, 6, seed=1), random(4, 6, seed=2), random(4, 6, seed=3)
    t, t2, y = random(3, 6, seed=4), random(3, 6, seed=5), torch.tensor([2, 0, 1, 1])
    total = torch.zeros(())
    for i in range(4):
        seen = t2.clone()
        seen[y[i]] = own2[i]
        for image, texts in ((v2[i], seen), (v2[i], t), (v[i], seen)):
            total = total + cross_entropy(20 * image @ texts.T, y[i]) / 4
    torch.testing.assert_close(loss_of(v, v2, t, t2, own2, y, 20.0), total)


def test_an_empty_memory_is_clip(backbone):
    support = colours(3, seed=1)
    model = create("reco", memory=[]).fit(backbone, support)
    zero_shot = create("zero-shot").fit(backbone, support)
    images = random(10, 16, seed=1)
    torch.testing.assert_close(model.logits(images), zero_shot.logits(images))


def test_without_training_and_weight_it_is_clip(backbone):
    support = colours(3, seed=1)
    model = create("reco", start=0.0, lr=0.0).fit(backbone, support)
    images = random(10, 16, seed=1)
    torch.testing.assert_close(model.logits(images), create("zero-shot").fit(backbone, support).logits(images))


def test_blocks_do_not_matter(monkeypatch):
    x, labels, texts = random(12, 16, seed=1), torch.arange(12) % 3, random(3, 16, seed=2)
    model = create("reco", epochs=2, lr=1e-3).fit_features(x, labels, texts)
    queries = random(20, 16, seed=3)
    whole = model.logits(queries)
    monkeypatch.setattr("clipadapt.methods.feature_adapter.reco._BLOCK", 3)
    torch.testing.assert_close(model.logits(queries), whole)


def test_memories_that_cannot_serve(backbone):
    with pytest.raises(ClipadaptError, match="images with their texts"):
        create("reco", memory=["a red star"]).fit(backbone, colours(2, seed=1))
    with pytest.raises(ClipadaptError, match="leave memory=None"):
        create("reco", memory=["a red star"]).fit_features(torch.eye(2), [0, 1], torch.eye(2))


def test_the_features_of_a_memory_serve_as_the_memory(backbone):
    support, memory = colours(3, seed=1), colours(4, seed=2)
    model = create("reco", memory=memory, epochs=2).fit(backbone, support)
    with torch.no_grad():
        texts = backbone.encode_texts([f"a photo of a {name}." for name in support.class_names])
        images = backbone.encode_images(torch.stack([backbone.preprocess(item.open()) for item in support.items]))
    pairs = model.memory_["images"], model.memory_["texts"]
    head = create("reco", epochs=2).fit_features(images, support.labels, texts, backbone.logit_scale, memory=pairs)
    torch.testing.assert_close(head.weight_, model.weight_, atol=1e-4, rtol=1e-4)
    with pytest.raises(ClipadaptError, match="memory has 16 images and 15 texts"):
        create("reco").fit_features(images, support.labels, texts, memory=(pairs[0], pairs[1][1:]))


def test_an_external_memory_is_kept_and_serves_new_classes(backbone, tmp_path):
    memory = colours(4, seed=2)
    support = colours(3, seed=1).only(["red", "green", "blue"])
    model = create("reco", memory=memory, epochs=2).fit(backbone, support)
    assert model.memory_["images"].shape == (16, 16)
    other = model.with_classes(["yellow", "red"])
    queries = colours(2, seed=3)
    loaded = clipadapt.load(other.save(tmp_path / "model"), backbone)
    torch.testing.assert_close(loaded.image_logits(queries)[0], other.image_logits(queries)[0])


@pytest.mark.claim("reco", "made-up features, half of the class names say nothing: pictures in the memory teach them")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_memory_of_rare_classes_teaches_them(seed, claim):
    """Classes whose names say nothing become known by the memory's images."""
    generator = torch.Generator().manual_seed(seed)
    centres, texts = random(8, 32, seed=5), random(8, 32, seed=6)  # texts 4 to 7 have nothing to do with images
    texts[:4] = normalize(centres[:4] + 0.5 * texts[:4], dim=1)

    def images_of(labels: torch.Tensor) -> torch.Tensor:
        return normalize(centres[labels] + 0.15 * torch.randn(len(labels), 32, generator=generator), dim=1)

    labels, held_out = torch.arange(64) % 8, torch.arange(400) % 8
    x, queries = images_of(labels), images_of(held_out)

    def accuracy(logits: torch.Tensor) -> float:
        return float((logits.argmax(1) == held_out).float().mean())

    fitted = create("reco", k=8, lr=1e-4).fit_features(x, labels, texts, 20.0)
    claim({"reco": accuracy(fitted.logits(queries)), "zero-shot": accuracy(queries @ texts.T)})
    assert accuracy(fitted.logits(queries)) > accuracy(queries @ texts.T) + 0.3
