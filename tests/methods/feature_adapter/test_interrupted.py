"""Feature methods that choose a moment of their training on validation data go on where they were interrupted."""

from __future__ import annotations

import pytest
import torch

from clipadapt.backbones import load_backbone
from clipadapt.methods import create
from tests.images import colours
from tests.tiny import tiny_clip


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    ("key", "settings", "at"),
    [
        ("tip-adapter-f", {"epoch": "val", "epochs": 6, "batch_size": 4, "lr": 0.05}, 9),
        ("ape-t", {"epoch": "val", "epochs": 6, "batch_size": 4, "lr": 0.05}, 9),
        ("cross-modal-probe", {"steps": 250}, 180),
        ("lp++", {"steps": 40}, 25),
        ("lp++", {"steps": 40, "variant": "official"}, 25),
    ],
)
def test_the_same_result_as_without_an_interruption(key, settings, at, tmp_path, monkeypatch):
    monkeypatch.setattr("clipadapt.training.loop.SAVE_EVERY", 0.0)
    backbone, support, val = load_backbone(tiny_clip()), colours(4, seed=1), colours(2, seed=4)

    def stop(line: dict) -> None:
        if line["step"] == at:
            raise Interrupted

    method, steps = create(key, **settings), []
    whole = create(key, **settings).fit(backbone, support, val=val)
    with pytest.raises(Interrupted):
        method.fit(backbone, support, val=val, resume=tmp_path, report=stop)
    again = create(key, **settings).fit(
        backbone, support, val=val, resume=tmp_path, report=lambda line: steps.append(line["step"])
    )
    assert steps[0] == at
    assert list(tmp_path.iterdir()) == []
    names = [name for name, value in vars(whole).items() if name.endswith("_") and isinstance(value, torch.Tensor)]
    assert "weight_" in names
    for name in names:
        assert torch.equal(getattr(again, name), getattr(whole, name)), name
