"""The encode-only backbone, on a stand-in with OpenCLIP's interface: its import needs a GPU build of torch."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import normalize

from clipadapt.backbones import AttentionMode, Backbone, Insertion, load_backbone
from clipadapt.backbones.two_towers import TwoTowers
from clipadapt.errors import BackboneError


class Visual(nn.Module):
    image_size = (16, 16)
    preprocess_cfg = {"size": (16, 16), "interpolation": "bicubic"}

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3 * 16 * 16, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.proj(image.flatten(1))


class Model(nn.Module):
    """OpenCLIP's CLIP as far as it is used: texts must have the full context length."""

    context_length = 9

    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(50, 5)
        self.logit_scale = nn.Parameter(torch.tensor(4.0))

    def encode_image(self, image: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        features = self.visual(image)
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        assert text.shape[1] == self.context_length
        features = self.token_embedding(text).sum(1)
        return nn.functional.normalize(features, dim=-1) if normalize else features


@pytest.fixture
def open_clip(monkeypatch) -> SimpleNamespace:
    torch.manual_seed(0)
    model = Model().train()

    def create(name: str, pretrained: str, device: str) -> tuple[nn.Module, object]:
        if (name, pretrained) != ("RN50", "openai"):
            raise RuntimeError(f"Model config for {name} not found.\nmore")
        return model.to(device), lambda picture: torch.full((3, 16, 16), picture.size[0] / 100)

    def tokenizer(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[48, *map(len, text.split()), 49] + [0] * (7 - len(text.split())) for text in texts])

    module = ModuleType("open_clip")
    module.create_model_from_pretrained, module.get_tokenizer = create, lambda name: tokenizer
    monkeypatch.setitem(sys.modules, "open_clip", module)
    return SimpleNamespace(model=model, tokenizer=tokenizer)


def test_encodes_like_open_clip(open_clip):
    backbone = load_backbone("open_clip:RN50/openai")
    pixels, texts = torch.randn(2, 3, 16, 16), ["a photo of a cat", "a dog"]
    images = open_clip.model.visual(pixels)
    torch.testing.assert_close(backbone.encode_images(pixels), normalize(images, dim=-1))
    torch.testing.assert_close(backbone.encode_images(pixels, normalize=False), images)
    ids = open_clip.tokenizer(texts)
    expected = open_clip.model.encode_text(ids, normalize=True)
    torch.testing.assert_close(backbone.encode_texts(texts), expected)
    torch.testing.assert_close(backbone.encode_tokens(ids[:, :7]), expected)  # filled up to the context length
    assert backbone.encode_texts([]).shape == (0, 5)
    assert (backbone.dim, backbone.image_size, backbone.context_length) == (5, (16, 16), 9)
    assert backbone.logit_scale == pytest.approx(54.598, abs=1e-3)
    assert backbone.logit_bias == 0
    assert backbone.preprocess(Image.new("RGB", (50, 20))).shape == (3, 16, 16)
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_fingerprint_and_copy(open_clip):
    backbone = load_backbone("open_clip:RN50/openai")
    other = backbone.copy()
    assert other.fingerprint == backbone.fingerprint
    with torch.no_grad():
        other.model.visual.proj.bias[0] += 1
    assert other.fingerprint != backbone.fingerprint
    assert isinstance(backbone, TwoTowers)
    assert not isinstance(backbone, Backbone)
    third = backbone.with_weights({"visual.proj.bias": lambda bias: bias * 2})
    pixels = torch.randn(2, 3, 16, 16)
    assert not torch.equal(third.encode(pixels), backbone.encode(pixels))
    assert third.fingerprint not in (backbone.fingerprint, other.fingerprint)
    assert third.copy().image_fingerprint == third.image_fingerprint != backbone.image_fingerprint


def test_fingerprints_are_those_of_before(open_clip):
    """As the class computed them when it was a child of `Backbone`."""
    with torch.no_grad():
        for parameter in open_clip.model.parameters():
            parameter.fill_(0.5)
    backbone = load_backbone("open_clip:RN50/openai")
    assert (backbone.fingerprint, backbone.image_fingerprint) == (
        "03e87195605d560facfe211aceaaa6e4",
        "9c46e46a4f2dcbc0d612419079f4728a",
    )


def test_everything_else_is_refused_by_name(open_clip, tmp_path):
    backbone = load_backbone("open_clip:RN50/openai")
    assert backbone.capabilities == {"texts", "gradients"}
    insertion = Insertion(torch.zeros(1, 5))
    for refused in (
        lambda: backbone.encode_images(torch.zeros(1, 3, 16, 16), tokens=True),
        lambda: backbone.encode_tokens(torch.zeros(1, 9, dtype=torch.int64), tokens=True),
        lambda: backbone.target_modules(),
        lambda: backbone.blocks("vision"),
        lambda: backbone.width("text"),
        lambda: backbone.embed_tokens(torch.zeros(1, 9, dtype=torch.int64)),
        lambda: backbone.end_positions(torch.zeros(1, 9, dtype=torch.int64)),
        lambda: backbone.inserted(text=[insertion]).__enter__(),
        lambda: backbone.attention("vv").__enter__(),
        lambda: backbone.save(tmp_path / "out"),
        lambda: backbone.edited(AttentionMode("vv")),
        lambda: backbone.tower("vision"),
        lambda: backbone.prompt_encoder(torch.zeros(1, 9, dtype=torch.int64)),
        lambda: backbone.project_rows(torch.zeros(1, 1, 5)),
    ):
        with pytest.raises(BackboneError, match="open_clip:RN50/openai comes through OpenCLIP, which encodes only"):
            refused()


def test_errors(open_clip, monkeypatch):
    with pytest.raises(BackboneError, match="must name a model and its weights, as in 'open_clip:RN50/openai'"):
        load_backbone("open_clip:RN50")
    with pytest.raises(BackboneError, match=r"OpenCLIP cannot load open_clip:RN7/x: Model config for RN7 not found\.$"):
        load_backbone("open_clip:RN7/x")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(BackboneError, match=r"install it with: pip install 'clipadapt\[open-clip\]'"):
        load_backbone("open_clip:RN50/openai")
