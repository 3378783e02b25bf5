"""Cells on Ray give the rows that local workers give. Needs `[ray]`; what hangs or dies is in tests/test_jobs.py."""

from __future__ import annotations

import numpy as np
import pytest

from clipadapt.errors import ClipadaptError
from clipadapt.evaluation.bench.run import run_suite
from clipadapt.evaluation.bench.suite import load_suite
from tests.ray_cluster import TOKEN

ray = pytest.importorskip("ray")

SUITE = """
title: Small
data: [points.yaml]
protocols: {few-shot: {shots: [1, 4]}}
methods: [zero-shot, tip-adapter, coop]
seeds: [1, 2]
"""
POINTS = """
name: points
title: Points around three centres
layout: features
places: {one: [one.npz]}
classes: 3
settings: {cut: {val: 0.2, test: 0.4}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    rng = np.random.default_rng(0)
    centres, labels = rng.standard_normal((3, 8)), np.repeat(np.arange(3), 20)
    np.savez(
        tmp_path / "one.npz",
        image_features=centres[labels] + rng.standard_normal((60, 8)),
        labels=labels,
        class_names=np.array(["ant", "bee", "cat"]),
        mean_prompt_features=centres + rng.standard_normal((3, 8)),
    )
    (tmp_path / "points.yaml").write_text(POINTS)
    (tmp_path / "small.yaml").write_text(SUITE)
    return tmp_path


def test_same_rows_as_local_workers(folder):
    suite = load_suite(folder / "small.yaml")
    local = run_suite(suite, folder / "local", root=folder, jobs=2, threads=1)
    there = run_suite(suite, folder / "ray", root=folder, jobs=2, threads=1, ray="local")
    assert not ray.is_initialized(), "what was started is stopped"
    for key in ("cell", "label", "seed", "options", "figures", "per_class", "details", "skipped", "trained_parameters"):
        assert [row.get(key) for row in there] == [row.get(key) for row in local], key
    assert sum("figures" in row for row in there) == 8
    assert all("needs a backbone with" in row["skipped"] for row in there if row["label"] == "coop")


def test_no_cluster_at_the_address(folder):
    with pytest.raises(ClipadaptError, match="cannot be reached at 'auto'"):
        run_suite(load_suite(folder / "small.yaml"), folder / "out", root=folder, threads=1, ray="auto")
