"""Kept patches: those of the trunk, resumable, and refused where they belong to other images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipadapt.errors import DataError
from clipadapt.training.embedded import patches as module
from clipadapt.training.embedded.patches import KeptPatches, keep_patches


@pytest.fixture
def keep(backbone, corpus, photos, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)

    def keep(folder, **more):
        keep_patches(backbone, corpus, photos, folder, views=2, photo_views=3, report=lambda line: None, **more)
        return KeptPatches.open(folder)

    return keep


def test_each_training_image_has_its_views(keep, corpus, tmp_path):
    kept = keep(tmp_path)
    training = corpus.select("train")
    assert kept.patches.shape == (2 * len(training) + 9, 32, 4, 4)
    assert kept.patches.dtype == np.float16
    assert kept.views[:, 0].tolist() == [*training, *training, *([-1] * 3), *([-2] * 3), *([-3] * 3)]
    flat = np.asarray(kept.patches, np.float32).reshape(len(kept.patches), -1)
    assert len(np.unique(flat, axis=0)) == len(flat), "no two views are alike"


def test_an_interrupted_run_goes_on(keep, backbone, tmp_path, monkeypatch):
    whole = keep(tmp_path / "whole")
    with monkeypatch.context() as patch:
        calls, plain = [], backbone.encode_patches

        def stop(pixels):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return plain(pixels)

        patch.setattr(backbone, "encode_patches", stop)
        with pytest.raises(KeyboardInterrupt):
            keep(tmp_path / "stopped")
        with pytest.raises(DataError, match="holds no whole set of patches"):
            KeptPatches.open(tmp_path / "stopped")
    assert np.array_equal(keep(tmp_path / "stopped").patches, whole.patches)


def test_patches_of_other_images_are_refused(keep, backbone, corpus, photos, tmp_path):
    keep(tmp_path)
    with pytest.raises(DataError, match="other images or views"):
        keep_patches(backbone, corpus, photos[:2], tmp_path, views=2, photo_views=3)


def test_they_are_what_the_trunk_gives(keep, backbone, corpus, photos, tmp_path, monkeypatch):
    seen = []
    plain = backbone.encode_patches
    monkeypatch.setattr(backbone, "encode_patches", lambda pixels: seen.append(pixels) or plain(pixels))
    kept = keep(tmp_path)
    monkeypatch.undo()
    given = plain(torch.cat(seen)).half().numpy()
    np.testing.assert_allclose(np.asarray(kept.patches, np.float32), given.astype(np.float32), rtol=2e-3, atol=2e-3)
