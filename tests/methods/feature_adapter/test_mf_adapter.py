"""MF-Adapter: its pieces computed plainly, its limit Tip-Adapter-F, and a task that only parts of images tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from clipadapt.backbones import load_backbone
from clipadapt.data import image_list
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from clipadapt.methods.feature_adapter.mf_adapter import (
    adapt,
    best_matches,
    consistent,
    distinctive,
    local_logits,
    windows,
)
from tests.images import colours
from tests.tiny import tiny_clip, tiny_siglip


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


def random(*shape: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_windows_are_means_of_squares():
    rows = random(2, 20, 3, seed=1)  # a grid of 4 x 5
    maps = rows.reshape(2, 4, 5, 3)
    expected = [maps[:, i : i + 2, j : j + 2].mean(dim=(1, 2)) for i in range(3) for j in range(4)]
    expected += [maps[:, :, j : j + 4].mean(dim=(1, 2)) for j in (0,)]
    torch.testing.assert_close(windows(rows, (4, 5), [2, 4]), torch.stack(expected, dim=1))
    whole = windows(rows, (4, 5), [9])  # cut to the grid
    torch.testing.assert_close(whole, rows.mean(dim=1, keepdim=True))
    assert windows(rows, (4, 5), [9, 12]).shape == (2, 1, 3), "sizes that are cut to the same count once"


def test_the_windows_farthest_from_the_mean_are_kept():
    found = torch.zeros(1, 5, 2)
    found[0, 1], found[0, 3] = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 3.0])
    assert torch.equal(distinctive(found, 2), found[:, [1, 3]])
    assert torch.equal(distinctive(found, 9), found)


def test_consistent_windows_come_back_in_the_other_images():
    shared, found = random(1, 8, seed=9)[0], random(4, 6, 8, seed=1)
    for i, place in enumerate((2, 0, 5, 3)):
        found[i, place] = normalize(shared + 0.05 * random(1, 8, seed=20 + i)[0], dim=0)
    units, sources = consistent(found, 1)
    assert sources.tolist() == [0, 1, 2, 3]
    assert torch.equal(units, torch.stack([found[0, 2], found[1, 0], found[2, 5], found[3, 3]]))
    units, sources = consistent(found[:1], 3)
    assert torch.equal(units, found[0, :3])
    assert sources.tolist() == [0, 0, 0]


def test_matches_and_logits_equal_the_plain_computation():
    found, units = random(7, 5, 8, seed=1), random(9, 8, seed=2)
    values = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2]), 4).float()  # class 3 has none
    expected = torch.einsum("bpw,uw->bpu", found, units).amax(dim=1)
    matches = best_matches(found, units, cells=100)  # two images at a time
    torch.testing.assert_close(matches, expected)
    sources = torch.tensor([0, 0, 1, 2, 2, 3, 3, 4, 4])
    hidden = torch.arange(7)[:, None] == sources
    logits = local_logits(matches, values, 3.0, hidden)
    for b in range(7):
        for c in range(4):
            own = [u for u in range(9) if values[u, c]]
            left = [u for u in own if sources[u] != b] or own
            affinity = [float(torch.exp(-3 * (1 - expected[b, u]))) for u in left]
            assert logits[b, c].item() == pytest.approx(np.mean(affinity) if left else 0.0, abs=1e-6)
    torch.testing.assert_close(local_logits(matches, values, 3.0)[5:], logits[5:])


def test_the_adapter_starts_as_nothing():
    found = random(3, 4, 8, seed=1)
    torch.testing.assert_close(adapt(found, torch.randn(2, 8), torch.zeros(8, 2)), found)


def test_gradients_do_not_depend_on_chunks():
    found, units = random(6, 5, 8, seed=1), random(9, 8, seed=2)
    gradients = []
    for cells in (1 << 24, 45):
        up = torch.zeros(8, 2, requires_grad=True)
        best_matches(adapt(found, random(2, 8, seed=3), up), units, cells).sum().backward()
        gradients.append(up.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_without_local_logits_it_is_tip_adapter_f(backbone):
    support, val, queries = colours(4, seed=1), colours(2, seed=4), colours(3, seed=2)
    ours = create("mf-adapter", gamma=0.0).fit(backbone, support)
    theirs = create("tip-adapter-f").fit(backbone, support)
    torch.testing.assert_close(ours.image_logits(queries)[0], theirs.image_logits(queries)[0], atol=1e-4, rtol=1e-4)
    ours = create("mf-adapter", gamma=0.0).fit(backbone, support, val=val)
    theirs = create("tip-adapter-f").fit(backbone, support, val=val)
    assert (ours.alpha_, ours.beta_) == (theirs.alpha_, theirs.beta_)


def test_val_can_switch_local_logits_off(backbone):
    support = colours(4, seed=1)
    model = create("mf-adapter").fit(backbone, support, val=colours(2, seed=4))
    assert model.gamma_ in [50.0 * factor for factor in (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)]


def test_each_image_is_looked_at_once(backbone, monkeypatch):
    seen = []
    plain = type(backbone).encode_images
    monkeypatch.setattr(
        type(backbone), "encode_images", lambda self, x, **more: seen.append(len(x)) or plain(self, x, **more)
    )
    model = create("mf-adapter", epochs=3).fit(backbone, colours(4, seed=1))
    assert sum(seen) == 16
    model.predict(colours(2, seed=2))
    assert sum(seen) == 24


def test_other_families_and_settings(backbone):
    support, queries = colours(3, seed=1), colours(2, seed=2)
    siglip = load_backbone(tiny_siglip())  # has no class token
    assert np.isfinite(create("mf-adapter", epochs=2).fit(siglip, support).predict_proba(queries)).all()
    model = create("mf-adapter", epochs=2, layer=-1, sizes=[1], keep=5, units=6).fit(backbone, support)
    assert model.units_.shape == (4 * 6, 32)
    with pytest.raises(ClipadaptError, match=r"sizes = \[0\] must be a list of window sides"):
        create("mf-adapter", sizes=[0])
    with pytest.raises(ClipadaptError, match="Layer 9"):
        create("mf-adapter", layer=9).fit(backbone, support)
    with pytest.raises(ClipadaptError, match="looks at images, not at features"):
        model.logits(torch.ones(1, 16))


@pytest.mark.claim("mf-adapter", "small marks at random places: local logits against the cache alone")
def test_parts_tell_what_the_whole_image_does_not(claim):
    """Classes differ in a small mark at a random place, on the embedded model: local logits beat the cache alone."""
    marks = {
        "cross": np.eye(8, dtype=bool) | np.eye(8, dtype=bool)[::-1],
        "bars": np.tile(np.arange(8) % 4 < 2, (8, 1)),
        "ring": np.pad(np.zeros((4, 4), bool), 2, constant_values=True),
    }

    def marked(per_class: int, seed: int):
        rng, images, labels = np.random.default_rng(seed), [], []
        for label, mark in enumerate(marks.values()):
            for _ in range(per_class):
                image = rng.integers(90, 150, (48, 48, 3)).astype(np.uint8)
                top, left = 8 * rng.integers(0, 5, 2)
                image[top : top + 16, left : left + 16][np.kron(mark, np.ones((2, 2), bool))] = 250
                images.append(image)
                labels.append(label)
        return image_list(images, labels, list(marks))

    embedded, test = load_backbone(), marked(30, seed=100)
    local, high = (
        [create("mf-adapter", gamma=gamma).fit(embedded, marked(8, seed=s)).score(test) for s in (1, 2)]
        for gamma in (50.0, 0.0)
    )
    claim({"mf-adapter": local, "without local logits": high})
    assert np.mean(local) > np.mean(high) + 0.1
