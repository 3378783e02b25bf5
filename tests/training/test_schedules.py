import math

import pytest

from clipadapt.training.schedules import cosine


def test_warm_up_is_linear_and_the_first_step_moves():
    assert [cosine(step, 100, warmup=4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_half_a_cosine_from_one_to_the_floor():
    assert cosine(0, 100) == 1.0
    assert cosine(50, 100) == pytest.approx(0.5)
    assert cosine(55, 110, warmup=10, floor=0.2) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(0.45 * math.pi)))
    assert cosine(100, 100, floor=0.1) == pytest.approx(0.1)
    assert cosine(10_000, 100, floor=0.1) == pytest.approx(0.1)


def test_never_rises_after_the_warm_up():
    factors = [cosine(step, 60, warmup=10) for step in range(10, 61)]
    assert factors == sorted(factors, reverse=True)


def test_a_run_that_is_all_warm_up():
    assert cosine(3, 4, warmup=4) == 1.0
    assert cosine(4, 4, warmup=4) == 1.0
