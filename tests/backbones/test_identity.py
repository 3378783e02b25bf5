"""A fingerprint is the same wherever it was computed, cheap to ask for, and never of something that lasts a moment."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import nn

from clipadapt.backbones import Insertion, identity, load_backbone
from clipadapt.backbones.published import PublishedFeatures
from clipadapt.data import as_items
from clipadapt.data.items import FeatureItem
from clipadapt.errors import BackboneError, ClipadaptError
from clipadapt.features import encode_images
from tests.tiny import tiny

# of the code before models, towers and edits had classes of their own: caches and saved models carry these
DIGESTS = {
    "clip": ("7883c2232c3f0be89ebf280133845281", "bd710e216b61948d1a66ac8190d4a302"),
    "siglip": ("d8499ab8c4d503f7ad690fc86a1320b2", "5aaf07cae87e8865b4850a224ebf1743"),
    "siglip2": ("154239ee65c3bb0ec3e5c66ae50049ea", "8179c9204b23bcec2cfa78d33dda2df4"),
    "metaclip_2": ("441781dc0fbea79742ed6e4926cc463b", "2f447c52336545c035ea8e447e1479f5"),
    "altclip": ("27ecfc4c68bc6ebb2fb5b12de69f199d", "9e6e875dfbbe7d85a25ba51c2a3052a8"),
    "chinese_clip": ("85b6a8ced0c0ca732730efaac3232d02", "30cd10305c00c44fb91e7a774453ad2e"),
    "embedded": ("2a2eed0d2d8f3e500d3219120be40fb6", "3d320f73a5d380989c2877a14265a705"),
}


@pytest.mark.parametrize("family", sorted(DIGESTS))
def test_fingerprints_are_those_of_before(family):
    backbone = load_backbone("embedded" if family == "embedded" else tiny(family))
    assert (backbone.fingerprint, backbone.image_fingerprint) == DIGESTS[family]


def test_what_is_written_is_noticed_however_it_is_written(clip):
    seen = [clip.fingerprint]
    other = clip.copy()
    weight = other.model.visual_projection.weight

    def load() -> None:
        other.model.load_state_dict({"visual_projection.weight": weight * 2}, strict=False)

    def step() -> None:
        weight.requires_grad_()
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.1).step()
        weight.requires_grad_(False)

    def merge() -> None:
        weight.data += 1

    def replace() -> None:
        other.model.visual_projection = nn.Linear(32, 16, bias=False).requires_grad_(False)

    def assign() -> None:
        other.model.load_state_dict({"visual_projection.weight": torch.ones(16, 32)}, strict=False, assign=True)

    for write in (load, step, merge, replace, assign):
        write()
        assert other.fingerprint not in seen, write.__name__
        seen.append(other.fingerprint)
    other.model.load_state_dict(clip.model.state_dict())
    assert other.fingerprint == clip.fingerprint


def test_text_weights_are_no_part_of_the_image_fingerprint(clip):
    other = clip.with_weights({"text_projection.weight": clip.weights()["text_projection.weight"] + 1})
    assert other.fingerprint != clip.fingerprint
    assert other.image_fingerprint == clip.image_fingerprint


def test_only_changed_weights_are_hashed_again(clip, monkeypatch):
    hashed: list[str] = []

    def weight_digest(name: str, tensor: torch.Tensor) -> bytes:
        hashed.append(name)
        return original(name, tensor)

    original = identity._weight_digest
    monkeypatch.setattr(identity, "_weight_digest", weight_digest)
    other = clip.copy()
    assert other.fingerprint == clip.fingerprint
    assert sorted(hashed) == sorted(other.weights())
    hashed.clear()
    for _ in range(2):
        assert other.image_fingerprint == clip.image_fingerprint
    assert hashed == []
    third = other.with_weights({"logit_scale": torch.tensor(1.0)})
    assert third.fingerprint != other.fingerprint
    assert hashed == ["logit_scale"]


def test_what_lasts_for_a_while_has_no_fingerprint(clip, pixels, texts, tmp_path):
    insertion = Insertion(torch.zeros(1, 32), at=-1, mode="insert")
    before = clip.fingerprint
    for name, during in (
        ("inserted", lambda: clip.inserted(vision=[insertion])),
        ("attention", lambda: clip.attention("vv")),
        ("after_blocks", lambda: clip.after_blocks("text", {0: lambda rows: None})),
    ):
        tower = "text" if name == "after_blocks" else "vision"
        with during():
            for ask in (
                lambda: clip.fingerprint,
                lambda: clip.image_fingerprint,
                lambda: encode_images(clip, [Image.new("RGB", (32, 32))], cache=tmp_path),
                clip.copy,
                lambda: clip.with_weights({}),
                clip.edited,
            ):
                with pytest.raises(BackboneError, match=f"while `{name}` changes its {tower} tower"):
                    ask()
            assert encode_images(clip, pixels, cache=False).features.shape == (3, 16)
        assert clip.fingerprint == before
    with clip.inserted():  # nothing
        assert clip.fingerprint == before


def test_a_tokenizer_that_cuts_elsewhere_counts(clip):
    other = clip.copy()
    assert other.tokenizer is not clip.tokenizer
    other.tokenizer.model_max_length = 8
    assert (other.context_length, clip.context_length) == (8, 16)
    assert other.fingerprint != clip.fingerprint
    assert other.image_fingerprint == clip.image_fingerprint


def test_a_backbone_is_an_encoder(backbone, pixels):
    item = as_items([Image.new("RGB", (50, 40), "red")])[0]
    prepared = backbone.prepare(item)
    assert torch.equal(prepared, backbone.preprocess(item.open()))
    assert torch.equal(backbone.encode(prepared[None]), backbone.encode_images(prepared[None]))
    assert backbone.encode(pixels).shape == (3, backbone.dim)


def test_published_features_are_an_encoder_of_features():
    published = PublishedFeatures("paper", {"cat": [1.0, 0.0], "dog": [0.0, 1.0]})
    item = FeatureItem("one", torch.tensor([0.6, 0.8]))
    assert torch.equal(published.encode(published.prepare(item)[None]), item.feature[None])
    with pytest.raises(ClipadaptError, match="no model to encode anything else"):
        published.prepare(as_items([Image.new("RGB", (8, 8))])[0])
