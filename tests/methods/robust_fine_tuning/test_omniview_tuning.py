"""Omniview-Tuning: centres and outliers as the official code finds them, its loss, its views, and what it merges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from clipadapt.backbones import load_backbone
from clipadapt.data import Dataset, image_list
from clipadapt.data.items import BytesItem
from clipadapt.data.playground.drawing import Playground
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_classes
from clipadapt.features.viewpoints import turned
from clipadapt.methods import create
from clipadapt.methods.robust_fine_tuning.omniview_tuning import aligned, centre, object_numbers
from tests.tiny import tiny


def unit_rows(n: int, d: int = 8, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return normalize(drawn + 2, dim=1)  # views of one object are alike


def test_centre_as_the_official_code_weighs_it():
    views = unit_rows(9).numpy().astype(np.float64)
    weights = []
    for i in range(9):
        cosines = sorted((float(views[i] @ views[j]) for j in range(9) if j != i), reverse=True)
        weights.append(1 / (np.mean(cosines[:5]) + 1e-8))
    expected = (np.array(weights)[:, None] * views).sum(0)
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(centre(torch.from_numpy(views).float(), 5).numpy(), expected, atol=1e-6)
    mean = views.mean(0) / np.linalg.norm(views.mean(0))
    np.testing.assert_allclose(centre(torch.from_numpy(views).float(), 0).numpy(), mean, atol=1e-6)


def test_centre_of_few_views():
    views = unit_rows(2)
    torch.testing.assert_close(centre(views, 5), normalize(views.sum(0), dim=0))
    torch.testing.assert_close(centre(views[:1], 5), views[0])


def test_outliers_are_the_views_farthest_from_the_centre():
    views, objects = unit_rows(12), torch.tensor([0, 1, 2] * 4)
    centres, far = aligned(views, objects, outliers=2, neighbours=0)
    assert far.sum() == 6
    for o in range(3):
        rows = [i for i in range(12) if objects[i] == o]
        torch.testing.assert_close(centres[o], normalize(views[rows].sum(0), dim=0))
        nearest_first = sorted(rows, key=lambda i: -float(views[i] @ centres[o]))
        assert [bool(far[i]) for i in nearest_first] == [False, False, True, True]
    assert aligned(views, objects, outliers=9, neighbours=5)[1].all()


def test_objects(support):
    assert object_numbers(support, "picture") == list(range(12))
    assert object_numbers(support, "class") == support.labels
    with pytest.raises(ClipadaptError, match="needs a data set with domains"):
        object_numbers(support, "domain")
    image = support.items[0].open()
    data = image_list([image] * 4, [0, 0, 1, 1], ["mug", "pan"])
    data = Dataset(data.items, data.labels, data.class_names, domains=["a", "b", "b", "b"])
    assert object_numbers(data, "domain") == [0, 1, 2, 2]
    named = [BytesItem(name, b"") for name in ("x/1.png", "x/2.png", "y/1.png", "x/3.png")]
    assert object_numbers(Dataset(named, [0, 0, 0, 1], ["mug", "pan"]), "folder") == [0, 0, 1, 2]


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_first_loss_written_out(backbone, support, weight):
    seen = []
    settings = {"views": 2, "tilt": 30, "roll": 20, "epochs": 1, "weight": weight, "outliers": 1, "neighbours": 0}
    create("omniview-tuning", seed=4, **settings).fit(backbone, support, report=lambda s: seen.append(s["loss"]))
    every = turned(support, 2, tilt=30, roll=20, seed=4, plain=True)
    pixels = torch.stack([backbone.preprocess(item.open()) for item in every.items])
    with torch.no_grad():
        views = backbone.encode_images(pixels)  # (36, D); B is zero at the start
    texts = encode_classes(backbone, support.class_names)[torch.tensor(every.labels)]
    order = torch.randperm(36, generator=torch.Generator().manual_seed(4))  # one batch
    logits = backbone.logit_scale * views[order] @ texts[order].T
    expected = (cross_entropy(logits, torch.arange(36)) + cross_entropy(logits.T, torch.arange(36))) / 2
    distances = []
    for image in range(12):
        its = views[3 * image : 3 * image + 3]
        distances.append((1 - its @ normalize(its.sum(0), dim=0)).max())
    assert seen == [pytest.approx((expected + weight * torch.stack(distances).mean()).item(), abs=1e-4)]


def test_views_of_an_object_move_together(backbone):
    """Features of unseen views of unseen images are closer to each other with the alignment than without it."""
    world = Playground(size=32, kinds=("star", "heart", "arrow"))
    support, test = world.dataset(3, seed=1), turned(world.dataset(4, seed=2), 4, tilt=60, roll=60, seed=77)
    pixels = torch.stack([backbone.preprocess(item.open()) for item in test.items])

    def spread(model) -> float:
        with torch.no_grad():
            features = model.encode_images(pixels).reshape(12, 4, -1)
        return float((1 - features @ features.transpose(1, 2)).mean())

    settings = {"views": 3, "tilt": 60, "roll": 60, "lr": 1e-2, "epochs": 10, "batch_size": 16}
    drawn, without = (
        create("omniview-tuning", weight=weight, **settings).fit(backbone, support).backbone_ for weight in (100.0, 0.0)
    )
    assert spread(drawn) < 0.8 * spread(without) < spread(backbone)


def test_no_view_and_no_module(backbone, support):
    model = create("omniview-tuning", views=0, module=False, epochs=2, lr=1e-3).fit(backbone, support)
    assert "visual_projection.weight" not in model.changed()
    full = create("omniview-tuning", views=0, epochs=2, lr=1e-3).fit(backbone, support)
    assert "visual_projection.weight" in full.changed()
    assert full.trained_parameters == model.trained_parameters + 8 * (32 + 16)
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in full.changed())


def test_a_tower_without_a_linear_projection(support):
    backbone = load_backbone(tiny("siglip"))
    with pytest.raises(ClipadaptError, match="set module=False"):
        create("omniview-tuning", views=0, epochs=1).fit(backbone, support)
    model = create("omniview-tuning", views=1, epochs=1, module=False).fit(backbone, support)
    assert model.predict(support).shape == (12,)
