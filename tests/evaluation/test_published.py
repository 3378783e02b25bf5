from __future__ import annotations

from clipadapt.evaluation.bench.published import beside, published


def test_every_figure_has_a_source_and_a_sensible_value():
    found = published()
    assert len(found) > 1000
    assert all(p.source for p in found)
    assert all(0 < p.value <= 100 for p in found if p.metric in ("top1", "base", "new", "H"))


def test_a_known_figure_with_its_caveat():
    (tip,) = [p for p in beside("tip-adapter-f", "imagenet") if p.shots == 16 and p.method == "Tip-Adapter-F"]
    assert (tip.value, tip.backbone) == (65.51, "RN50")
    assert "test set" in tip.caveat
    assert beside("zero-shot", "imagenet")[0].value == 60.32
    assert not beside("tip-adapter", "no such data")
