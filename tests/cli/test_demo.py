"""The demo runs offline, on the embedded model, and shows an adapted model that is better."""

import json

import clipadapt
from clipadapt.data.digits import DIGITS, handwritten_digits


def test_digits_are_dark_ink_on_white_paper():
    digits = handwritten_digits()
    assert len(digits) == 1797
    assert digits.class_names == DIGITS
    image = digits.items[0].open()
    assert image.size == (8, 8)
    assert [digits.labels[0], image.getpixel((0, 0))] == [0, (255, 255, 255)]


def test_the_demo_is_better_than_zero_shot(run, tmp_path, monkeypatch):
    monkeypatch.setattr("clipadapt.evaluation.selection.list_methods", lambda: ["gda-clip", "tip-adapter"])
    document = json.loads(run("demo", "--out", tmp_path / "digits", "--json").stdout)
    held_out = document["held_out"]
    assert document["data"]["support"] == 160
    assert held_out["images"] == 539
    assert held_out["adapted"]["interval"][0] > held_out["zero_shot"]["interval"][1]
    assert clipadapt.load(tmp_path / "digits").class_names_ == DIGITS
