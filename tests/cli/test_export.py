"""The exported model answers as the model does, and what 8 bits cost is said."""

from __future__ import annotations

import json

import numpy as np
from transformers import CLIPModel

import clipadapt
from clipadapt.serve.onnx import OnnxModel


def test_onnx_and_its_accuracy(run, model, photos, tmp_path, monkeypatch):
    document = json.loads(run("export", model, tmp_path / "onnx", "--int8", "--data", photos, "--json").stdout)
    assert set(document["bytes"]) == {"image.onnx", "image.int8.onnx", "text.onnx", "text.int8.onnx"}
    data, fitted = clipadapt.image_folder(photos), clipadapt.load(model)
    plain, onnx, int8 = document["compared"]
    assert [row["form"] for row in document["compared"]] == ["torch", "onnx", "int8"]
    assert plain["accuracy"] == onnx["accuracy"] == fitted.score(data)
    assert onnx["same_class"] == 1
    predicted = OnnxModel(tmp_path / "onnx", int8=True).run(data)[1].argmax(1)
    assert int8["accuracy"] == np.mean(predicted == np.array(data.labels))
    monkeypatch.setattr("clipadapt.serve.onnx.export_onnx", lambda *_, **__: tmp_path / "onnx")  # takes long
    printed = run("export", model, tmp_path / "onnx", "--int8", "--data", photos).stdout
    assert "8 bits" in printed
    assert "on 32 images" in printed


def test_int8_needs_images_to_measure_on(run, model, tmp_path):
    assert "--data PHOTOS" in run("export", model, tmp_path / "out", "--int8", code=1).stderr
    assert not (tmp_path / "out").exists()


def test_towers_for_transformers(run, model, photos, backbone, tmp_path):
    error = run("export", model, tmp_path / "towers", "--format", "transformers", code=1).stderr
    assert "tip-adapter changes no weights" in error
    tuned = tmp_path / "tuned"
    run("adapt", photos, "--backbone", backbone, "--method", "fine-tune", "--shots", 2, "--out", tuned)
    run("export", tuned, tmp_path / "towers", "--format", "transformers")
    assert CLIPModel.from_pretrained(tmp_path / "towers").config.projection_dim == 16
