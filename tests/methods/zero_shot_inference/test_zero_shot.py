"""Class texts: one template, an ensemble, descriptions."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import normalize

from clipadapt.backbones import load_backbone
from clipadapt.methods import create
from tests.tiny import tiny_clip

NAMES = ["red star", "green circle"]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


def classifier(backbone, sentences: list[list[str]]) -> torch.Tensor:
    with torch.no_grad():
        return backbone.logit_scale * normalize(
            torch.stack([backbone.encode_texts(s).mean(0) for s in sentences]), dim=1
        )


@pytest.mark.parametrize(
    ("templates", "sentences"),
    [
        ("photo", [["a photo of a red star."], ["a photo of a green circle."]]),
        ("small {}", [["small red star"], ["small green circle"]]),
        (["a {}", "the {}."], [["a red star", "the red star."], ["a green circle", "the green circle."]]),
        (
            {"red star": ["a star", "a red image"], "green circle": ["a circle"]},
            [["a star", "a red image"], ["a circle"]],
        ),
    ],
)
def test_templates_ensembles_descriptions(backbone, templates, sentences):
    model = create("zero-shot", templates=templates).fit(backbone, class_names=NAMES)
    torch.testing.assert_close(model.weight_, classifier(backbone, sentences))


def test_descriptions_from_a_file(backbone, tmp_path):
    descriptions = {"red star": ["a red house", "the star"], "green circle": ["a green dog"]}
    file = tmp_path / "descriptions.json"
    file.write_text(json.dumps(descriptions))
    model = create("zero-shot", templates=file).fit(backbone, class_names=NAMES)
    torch.testing.assert_close(model.weight_, classifier(backbone, list(descriptions.values())))
    model.save(tmp_path / "model")  # a path among the hyper-parameters is kept as text
