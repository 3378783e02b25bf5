"""The protocol of corruptions: its figures are those of the corrupted images, opened one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipadapt.backbones import load_backbone
from clipadapt.backbones.published import PublishedFeatures
from clipadapt.data import Dataset, Split
from clipadapt.data.corruptions.kinds import KINDS, corrupted
from clipadapt.data.items import FeatureItem
from clipadapt.errors import ClipadaptError
from clipadapt.evaluation.protocol import NotApplicable, options, protocol
from clipadapt.methods import create
from tests.images import colours
from tests.tiny import tiny_clip


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


@pytest.fixture(scope="module")
def split() -> Split:
    return Split(colours(6, seed=1), colours(2, seed=2), colours(5, seed=3))


def run(backbone, split, method="linear-probe", seed=1, **more):
    return protocol("corruptions")(create(method), backbone, split, seed, **{"shots": 4, **more})


def test_options():
    assert options("corruptions") == {"shots": 16, "kinds": "all", "severities": (1, 2, 3, 4, 5), "limit": None}


def test_figures_are_those_of_corrupted_images(backbone, split):
    kinds, severities = ["gaussian-noise", "contrast", "fog"], [1, 5]
    found = run(backbone, split, kinds=kinds, severities=severities)
    plain = create("linear-probe").fit(backbone, split.train.few_shot(4, seed=1))
    assert found.figures["accuracy"] == plain.score(split.test)
    table = {
        kind: {str(s): plain.score(corrupted(split.test, kind, s, 1, size=32)) for s in severities} for kind in kinds
    }
    assert found.details["corruptions"] == table
    assert found.figures["corrupted"] == pytest.approx(np.mean([list(row.values()) for row in table.values()]))
    assert found.details["by_kind"]["fog"] == pytest.approx(np.mean(list(table["fog"].values())))
    assert found.details["by_severity"]["5"] == pytest.approx(np.mean([row["5"] for row in table.values()]))
    assert found.figures["corrupted"] < found.figures["accuracy"]


def test_groups_one_severity_and_a_limit(backbone, split):
    found = run(backbone, split, "zero-shot", kinds="digital", severities=3, limit=2)
    assert list(found.details["by_kind"]) == list(KINDS[11:])
    assert list(found.details["by_severity"]) == ["3"]
    few = split.test.few_shot(2, seed=1)
    assert found.figures["accuracy"] == found.model.score(few)
    other = run(backbone, split, "zero-shot", seed=2, kinds="digital", severities=3, limit=2)
    assert other.figures == found.figures, "test images and corruptions do not hang on the seed"


def test_what_cannot_be(backbone, split):
    with pytest.raises(ClipadaptError, match="noise"):
        run(backbone, split, kinds="noises")
    with pytest.raises(ClipadaptError, match="severity"):
        run(backbone, split, severities=[0])
    names = split.test.class_names
    features = Dataset([FeatureItem(str(i), row) for i, row in enumerate(torch.eye(4))], [0, 1, 2, 3], names)
    published = PublishedFeatures("points", dict(zip(names, torch.eye(4), strict=True)))
    with pytest.raises(NotApplicable, match="without pixels"):
        run(published, Split(features, features, features))
