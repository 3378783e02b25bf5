"""The recipe: which rate each weight gets, what stays frozen, the pull to the start, and a plain step as equal."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from clipadapt.backbones import load_backbone
from clipadapt.backbones.families import FAMILIES
from clipadapt.features import encode_classes
from clipadapt.methods import create
from clipadapt.methods.kinds.weights import class_encoder, tower_weights
from clipadapt.methods.robust_fine_tuning.full_fine_tune import layers_above
from tests.images import colours
from tests.tiny import tiny, tiny_clip

QUICK = {"epochs": 2, "lr": 1e-3, "batch_size": 8, "min_scale": 1.0}


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


def test_layers_of_clip(backbone):
    expected = {
        "visual_projection.weight": 0,
        "vision_model.post_layernorm.bias": 0,
        "vision_model.encoder.layers.2.mlp.fc1.weight": 1,
        "vision_model.encoder.layers.0.mlp.fc1.weight": 3,
        "vision_model.pre_layrnorm.weight": 4,
        "vision_model.embeddings.class_embedding": 4,
        "text_model.encoder.layers.1.layer_norm1.weight": 2,
        "text_model.embeddings.position_embedding.weight": 4,
        "text_projection.weight": 0,
    }
    assert {name: layers_above(backbone, name) for name in expected} == expected


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_layers_of_every_family(family):
    backbone = load_backbone(tiny(family))
    names = tower_weights(backbone, "both")
    found = {name: layers_above(backbone, name) for name in names}
    for tower, prefix in (("vision", "vis"), ("text", "text")):
        depth = len(backbone.blocks(tower))
        assert {n for name, n in found.items() if name.startswith(prefix)} == set(range(depth + 2))
        assert found[f"{backbone.tower(tower).blocks}.0.{backbone.tower(tower).q}.weight"] == depth
    assert found[f"{backbone.tower('text').tokens}.weight"] == len(backbone.blocks("text")) + 1


def test_class_encoder_is_encode_classes_with_gradients(backbone):
    names, templates = ["cat", "small_dog", "star"], ["a photo of a {}.", "the {}"]
    copy = backbone.copy()
    for name in tower_weights(copy, "text"):
        copy.model.get_parameter(name).requires_grad_()
    encode = class_encoder(copy, names, templates)
    torch.testing.assert_close(encode().detach(), encode_classes(backbone, names, templates))
    encode()[0, 0].backward()
    assert copy.model.text_projection.weight.grad.abs().max() > 0


@pytest.mark.parametrize("tower", ["both", "vision"])
def test_first_step_moves_each_layer_by_its_rate(backbone, tower):
    """Adam's first step is the rate times the gradient's sign, so movements show the rates."""
    support = colours(2, seed=1)
    setting = {"epochs": 1, "batch_size": 8, "lr": 1e-3, "layer_decay": 0.5, "min_scale": 1.0}
    model = create("full-fine-tune", tower=tower, **setting).fit(backbone, support)

    plain = backbone.copy()
    plain.model.requires_grad_()
    pixels = torch.stack([backbone.preprocess(item.open()) for item in support.items])
    images = normalize(plain.model.get_image_features(pixels).pooler_output, dim=1)
    ids = backbone.tokenize([f"a photo of a {name}." for name in support.class_names])
    texts = normalize(plain.model.get_text_features(ids).pooler_output, dim=1)
    cross_entropy(plain.logit_scale * images @ texts.T, torch.tensor(support.labels)).backward()
    original = backbone.model.state_dict()
    for name, p in plain.model.named_parameters():
        frozen = name in ("logit_scale", "text_model.embeddings.token_embedding.weight")
        if frozen or (tower == "vision" and name.startswith("text")):
            assert name not in model.update_
            continue
        rate = 1e-3 * 0.5 ** layers_above(backbone, name)
        clear = p.grad.abs() > 1e-4
        moved = model.update_[name] - original[name] * (1 - 0.1 * rate)  # decoupled weight decay
        torch.testing.assert_close(moved[clear], -rate * p.grad[clear].sign(), atol=0.02 * rate, rtol=0)


def test_pull_holds_the_weights_back(backbone):
    support, start = colours(3, seed=1), backbone.model.state_dict()

    def distance(pull: float) -> float:
        model = create("full-fine-tune", pull=pull, **QUICK).fit(backbone, support)
        return sum(float((w - start[n]).square().sum()) for n, w in model.update_.items())

    free, weak, strong = distance(0.0), distance(1.0), distance(1000.0)
    assert strong < weak < free
    first = []
    for pull in (0.0, 1000.0):
        lines: list[dict] = []
        create("full-fine-tune", pull=pull, **QUICK).fit(backbone, support, report=lines.append)
        first.append(lines[0]["loss"])
    assert first[0] == first[1], "at the start there is nothing to pull"


def test_classifier_is_the_tuned_text_towers(backbone):
    support = colours(2, seed=1)
    both = create("full-fine-tune", **QUICK).fit(backbone, support)
    expected = both.backbone_.logit_scale * encode_classes(both.backbone_, support.class_names)
    torch.testing.assert_close(both.weight_, expected)
    assert both.backbone_.logit_scale == backbone.logit_scale
    vision = create("full-fine-tune", tower="vision", **QUICK).fit(backbone, support)
    torch.testing.assert_close(vision.weight_, backbone.logit_scale * encode_classes(backbone, support.class_names))
    assert not torch.allclose(both.weight_, vision.weight_, atol=1e-3)


def test_a_second_fit_is_as_the_first_and_nothing_of_the_training_stays(backbone):
    support = colours(3, seed=1)
    model = create("full-fine-tune", pull=1.0, **QUICK).fit(backbone, support)
    kept = {name: tensor.clone() for name, tensor in model.update_.items()}
    own = {*vars(model)}
    assert not {"_learned", "_first", "_layers"} & own
    model.fit(backbone, support)
    assert {*vars(model)} == own
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.update_.items())
