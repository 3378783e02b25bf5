"""Methods that keep the epoch that is best on validation data: chosen as from all of them, also when interrupted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipadapt import create
from clipadapt.backbones import load_backbone
from clipadapt.training import loop
from clipadapt.training.search import Best
from tests.pictures import colours
from tests.tiny import tiny_clip

# a rate at which the best epoch is neither the first nor the last
SETTINGS = {
    "tip-adapter-f": {"lr": 0.3, "epochs": 8, "batch_size": 3},
    "ape-t": {"lr": 0.3, "epochs": 8, "batch_size": 3},
}


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


def fit(key, backbone, epoch="val", **more):
    method = create(key, epoch=epoch, **SETTINGS[key])
    return method.fit(backbone, colours(3, seed=1), val=colours(3, seed=2), **more)


@pytest.mark.parametrize("key", SETTINGS)
@pytest.mark.parametrize("epoch", ["val", "last"])
def test_an_interrupted_fit_continues_to_the_same_model(key, epoch, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    whole = fit(key, backbone, epoch)
    seen: list[int] = []

    def interrupt(line: dict) -> None:
        seen.append(line["step"])
        if line["step"] == line["steps"] - 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(key, backbone, epoch, report=interrupt, resume=tmp_path / "run")
    after: list[int] = []
    resumed = fit(key, backbone, epoch, report=lambda line: after.append(line["step"]), resume=tmp_path / "run")
    assert after[0] == seen[-1], "the steps before the interruption are not taken again"
    queries = colours(2, seed=3)
    np.testing.assert_array_equal(resumed.predict_proba(queries), whole.predict_proba(queries))
    for name in ("keys_", "values_", "weight_"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))


@pytest.mark.parametrize("key", SETTINGS)
def test_the_epoch_is_the_first_of_the_best(key, backbone, monkeypatch):
    """Every figure that is offered is recorded; the kept tensors are those of the first highest one."""
    module = f"clipadapt.methods.feature_adapter.{key.replace('-', '_')}"
    offered: list[tuple[float, list[torch.Tensor]]] = []

    class Recorded(Best):
        def offer(self, figure):
            offered.append((figure, [tensor.detach().clone() for tensor in self.tensors]))
            super().offer(figure)

        def restore(self):
            super().restore()
            figures = [figure for figure, _ in offered]
            assert len(figures) == 8
            for ours, theirs in zip(self.tensors, offered[figures.index(max(figures))][1], strict=True):
                assert torch.equal(ours, theirs)

    monkeypatch.setattr(f"{module}.Best", Recorded)
    fit(key, backbone)
    assert len(offered) == 8
