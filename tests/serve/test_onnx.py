"""Exported models, run by onnxruntime, predict what they predict here; what cannot be exported is refused."""

from __future__ import annotations

import json
import shutil
from functools import cache

import numpy as np
import pytest
import torch

from clipadapt.backbones import load_backbone
from clipadapt.backbones.scratch import new_backbone
from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.methods import create
from clipadapt.serve.onnx import OnnxModel, export_onnx
from tests.images import colours
from tests.quick import quick
from tests.tiny import tiny, tiny_clip

TEXTS = ["a cat", "a photo of the red house"]


def fitted(key: str, folder=None):
    return quick(key).fit(load_backbone(folder or tiny_clip()), colours(4, seed=1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A fitted method of a key, and the folder with its graphs, which no test changes."""

    @cache
    def export(key):
        model = fitted(key)
        return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / key)

    return export


@pytest.mark.parametrize("key", ["gda-clip", "tip-adapter-f", "clip-lora", "vl-adapter", "coop", "maple"])
def test_onnx_equals_torch(key, exported, monkeypatch):
    """A closed form, a cache, changed weights, adapters, prompts in the text and in both towers."""
    if key == "tip-adapter-f":  # whose text tower is that of gda-clip
        monkeypatch.setattr("clipadapt.serve.onnx._texts_are_plain", lambda method: False)
    model, folder = exported(key)
    graphs = OnnxModel(folder)
    queries = colours(3, seed=2)
    features, logits = graphs.run(queries)
    expected, _ = model.image_logits(queries)
    with torch.no_grad():
        pixels = torch.stack([model.backbone_.preprocess(item.open()) for item in queries.items])
        np.testing.assert_allclose(features, model.encoder.encode(pixels).numpy(), atol=1e-5)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(graphs.predict_proba(queries), model.predict_proba(queries), atol=1e-4)
    assert graphs.class_names == model.class_names_
    if key in ("coop", "maple", "vl-adapter", "tip-adapter-f"):
        with pytest.raises(ClipadaptError, match="learned prompts"):
            graphs.encode_texts(TEXTS)
    else:
        np.testing.assert_allclose(graphs.encode_texts(TEXTS), model.encode_texts(TEXTS).numpy(), atol=1e-5)


@pytest.mark.parametrize("family", ["siglip", "altclip"])  # padding that is attended to, and masked
def test_text_towers_of_every_kind(family, tmp_path):
    model = fitted("zero-shot", tiny(family))
    exported = OnnxModel(export_onnx(model, tmp_path))
    np.testing.assert_allclose(exported.encode_texts(TEXTS), model.encode_texts(TEXTS).numpy(), atol=1e-5)


def test_a_trunk_is_part_of_the_graph(tmp_path, monkeypatch):
    """And of no plain transformers folder, which its weights would otherwise go to."""
    monkeypatch.setattr("clipadapt.serve.onnx._texts_are_plain", lambda method: False)
    model = fitted("fine-tune", tiny("clip_trunk"))
    queries = colours(3, seed=2)
    graphs = OnnxModel(export_onnx(model, tmp_path / "graphs"))
    np.testing.assert_allclose(graphs.run(queries)[1], model.image_logits(queries)[0].numpy(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ClipadaptError, match="fine-tune: transformers has no class for towers behind a trunk"):
        model.export(tmp_path / "plain")


def test_int8_is_smaller_and_near(tmp_path):
    wide = {"vision_width": 192, "vision_heads": 3, "text_width": 192, "text_heads": 3, "projection_dim": 192}
    model = create("linear-probe").fit(new_backbone("tiny", **wide), colours(8, seed=1))
    export_onnx(model, tmp_path, int8=True)
    assert (tmp_path / "image.int8.onnx").stat().st_size < 0.5 * (tmp_path / "image.onnx").stat().st_size
    queries = colours(8, seed=2)
    exact, rounded = OnnxModel(tmp_path).run(queries)[0], OnnxModel(tmp_path, int8=True).run(queries)[0]
    assert 0.98 < (exact * rounded).sum(1).min() < 1 - 1e-6
    texts = OnnxModel(tmp_path).encode_texts(TEXTS), OnnxModel(tmp_path, int8=True).encode_texts(TEXTS)
    assert (texts[0] * texts[1]).sum(1).min() > 0.98


def test_what_looks_at_images_is_refused(tmp_path):
    with pytest.raises(ClipadaptError, match="falip cannot be exported"):
        export_onnx(fitted("falip"), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_folders_are_checked(exported, tmp_path):
    with pytest.raises(ArtifactError, match="is not an exported model"):
        OnnxModel(tmp_path)
    model, folder = exported("gda-clip")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ArtifactError, match="holds other files"):
        export_onnx(model, tmp_path)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ArtifactError, match="without int8"):
        OnnxModel(tmp_path, int8=True)
    (tmp_path / "image.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match=r"image\.onnx is missing or damaged"):
        OnnxModel(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(ArtifactError, match="upgrade clipadapt"):
        OnnxModel(tmp_path)
