"""The survey's factors: the correlations that synthetic rows were made with, and gaps that grow with the shift."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from clipadapt.evaluation.bench.suite import load_suite
from clipadapt.evaluation.studies.survey import domain_gaps, factors, main, mean_distance, proxy_a_distance
from clipadapt.methods import method_class

GAPS = {("near", "m"): 0.1, ("middle", "m"): 0.5, ("far", "m"): 0.9}
CAPACITY = {"names": 0, "small": 100, "large": 10_000}


def row(data, label, shots, seed, accuracy, backbone="m"):
    return {
        "data": data,
        "backbone": backbone,
        "published": False,
        "protocol": "few-shot",
        "options": {"shots": shots},
        "label": label,
        "seed": seed,
        "figures": {"accuracy": accuracy},
        "trained_parameters": CAPACITY[label],
    }


def rows_where(shots_help, gap_hurts, capacity_hurts):
    rng = np.random.default_rng(0)
    found = []
    for (data, _), label, shots, seed in product(GAPS, CAPACITY, (1, 2, 4, 8), (1, 2)):
        learned = label != "names"
        error = 0.4 - shots_help * 0.05 * math.log2(shots) * learned
        error += gap_hurts * 0.3 * GAPS[data, "m"] + capacity_hurts * 0.02 * math.log10(1 + CAPACITY[label])
        found.append(row(data, label, shots, seed, 1 - error + 0.001 * rng.standard_normal() * learned))
    return found


def test_correlations_are_those_of_the_rows():
    shots, gap, capacity = factors(rows_where(1, 1, 1), GAPS)
    assert (shots.name, gap.name, capacity.name) == ("shots", "gap", "capacity")
    assert shots.correlation == pytest.approx(-1)
    assert shots.blocks == 6, "the method that learns nothing has no curve"
    assert shots.points == 24
    assert gap.correlation == pytest.approx(1)
    assert gap.blocks == 12
    assert gap.interval == pytest.approx((1, 1))
    assert capacity.blocks == 12
    first_shot = factors([r for r in rows_where(1, 1, 1) if r["options"]["shots"] == 1], GAPS)[2]
    assert first_shot.correlation == pytest.approx(1)
    shots, gap, capacity = factors(rows_where(-1, -1, -1), GAPS)
    assert shots.correlation == pytest.approx(1)
    assert gap.correlation == pytest.approx(-1)
    assert factors([r for r in rows_where(0, 1, -1) if r["seed"] == 1], GAPS)[2].correlation == pytest.approx(-1)


def test_what_says_nothing_is_left_out():
    rows = [row("near", "small", 4, 1, 0.5), row("near", "large", 4, 1, 0.5)]
    assert [f.blocks for f in factors(rows, GAPS)] == [0, 0, 0]
    assert all(math.isnan(f.correlation) for f in factors(rows))
    assert factors([])[0].points == 0
    other = [row(d, "small", 4, 1, a, backbone="x") for d, a in (("near", 0.4), ("far", 0.5))]
    assert factors(other, GAPS)[1].blocks == 0, "no gap is known for this backbone"
    skipped = {**rows[0], "figures": {}} | {"protocol": "domains"}
    assert factors([*rows, skipped]) == factors(rows)


def test_distances_grow_with_the_shift():
    generator = torch.Generator().manual_seed(0)

    def points(shift, n=300):
        return normalize(torch.randn(n, 16, generator=generator) + shift * torch.eye(16)[0], dim=1)

    source = points(0.0)
    for measure in (mean_distance, proxy_a_distance):
        same, near, far = (measure(source, points(shift)) for shift in (0.0, 1.0, 4.0))
        assert 0 <= same < near < far <= 2
    assert proxy_a_distance(source, points(0.0)) < 0.35
    assert proxy_a_distance(source, points(50.0)) > 1.95
    assert proxy_a_distance(points(0.0, 1000), points(0.0, 40)) < 0.8, "sizes do not tell"
    assert mean_distance(source, source) == 0
    rows = source.double().mean(0) - points(1.0).double().mean(0)
    assert mean_distance(source, source - rows.float()) == pytest.approx(float(rows.norm()), abs=1e-5)


def test_gap_of_the_playground_is_smaller_than_that_of_digits():
    rows = [row("playground-kinds", "small", 1, 1, 0.5, "embedded"), row("digits", "small", 1, 1, 0.5, "embedded")]
    published = {**rows[0], "data": "whu-rs19", "published": True}
    found = domain_gaps([*rows, published], most=60)
    assert found.keys() == {("playground-kinds", "embedded"), ("digits", "embedded")}
    assert found["playground-kinds", "embedded"] < 0.8 < found["digits", "embedded"]
    same = domain_gaps(rows, most=60, reference="digits", measure="mean")
    assert same["digits", "embedded"] == pytest.approx(0, abs=1e-6)


def test_main_prints_the_three_factors(tmp_path, capsys):
    rows = [row("digits", "small", 1, 1, 0.3, "embedded"), row("digits", "small", 4, 1, 0.6, "embedded")]
    failed = {key: value for key, value in rows[0].items() if key != "figures"} | {"error": "no image"}
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in [*rows, failed]))
    assert main(file, measure="mean")[0].correlation == pytest.approx(-1)
    said = capsys.readouterr().out
    assert "gap of digits for embedded" in said
    assert "error and shots: -1.00" in said
    assert "error and capacity: no two cells to compare" in said


def test_the_suite_has_a_method_of_each_branch():
    families = {method_class(entry.key).card.family for entry in load_suite("survey").methods}
    assert {"prompt-learning", "feature-adapter"} <= families
