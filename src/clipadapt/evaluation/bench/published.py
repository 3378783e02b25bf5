"""Figures that others published, with their source and what one must know to read them; never mixed up with ours."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("published_fewshot.csv")
_DATA = {  # how the file calls the data sets that have a definition
    "caltech101": "caltech101",
    "dtd": "dtd",
    "eurosat": "eurosat",
    "fgvc": "aircraft",
    "fgvcaircraft": "aircraft",
    "flowers102": "flowers102",
    "food101": "food101",
    "imagenet": "imagenet",
    "oxford_flowers": "flowers102",
    "oxford_pets": "pets",
    "stanford_cars": "cars",
    "stanfordcars": "cars",
    "sun397": "sun397",
    "ucf101": "ucf101",
    "imagenetv2": "imagenetv2",
    "imagenet_sketch": "imagenet-sketch",
    "imagenet_a": "imagenet-a",
    "imagenet_r": "imagenet-r",
}
_METHODS = {  # how the file calls the methods whose keys differ from its names
    "clip zero-shot": "zero-shot",
    "gda": "gda-clip",
    "tip-x": "sus-x",
    "lp++": "lp++",
    "vpt-deep": "vpt",
}
_CAVEATS = {  # by method
    "tip-adapter-f": "epoch and coefficients picked on the test set",
    "promptkd": "unlabelled images of all classes, and a larger teacher",
    "ape": "class descriptions by a language model",
    "ape-t": "class descriptions by a language model",
}
_PICKED = "coefficients picked on the test set, as ImageNet has no other"
_CAVEATS_ON = {  # by method and data set, in addition
    ("tip-adapter", "imagenet"): _PICKED,
    ("ape", "imagenet"): _PICKED,
    ("gda-clip", "imagenet"): _PICKED,
}


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        method: as its source calls it.
        key: the method of ours that it is comparable with, or the name in lower case.
        data: the definition's name, or the source's word.
        shots: None if the source does not say.
        metric: "top1", "base", "new" or "H".
        value: in %.
        caveat: what makes it no fair comparison; empty if nothing is known.
    """

    method: str
    key: str
    backbone: str
    setting: str
    data: str
    shots: int | None
    metric: str
    value: float
    source: str
    caveat: str


@cache
def published() -> tuple[Published, ...]:
    """All figures of the file whose value is a number."""
    found = []
    with open(FILE, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            try:
                value = float(row["value"])
            except (TypeError, ValueError):
                continue
            name, data = row["method"].strip(), _DATA.get(row["dataset"], row["dataset"])
            plain = name.split(" (")[0].lower()
            key = _METHODS.get(plain, plain.replace(" ", "-"))
            caveat = "; ".join(filter(None, (_CAVEATS.get(key), _CAVEATS_ON.get((key, data)))))
            shots = int(row["shots"]) if row["shots"].isdigit() else None
            rest = (row["setting"], data, shots, row["metric"], value, row["source"], caveat)
            found.append(Published(name, key, row["backbone"], *rest))
    return tuple(found)


def beside(key: str, data: str, setting: str = "few-shot") -> list[Published]:
    """What was published for a method (its key) on a data set in a setting."""
    return [p for p in published() if (p.key, p.data, p.setting) == (key, data, setting)]
