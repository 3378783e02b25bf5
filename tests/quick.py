"""Settings with which each method learns something in seconds on tiny data; for tests only.

They were chosen by hand on noisy plain colours and digits, to make tests short. Nothing that the library reports was
measured with them.
"""

from __future__ import annotations

from typing import Any

from clipadapt.methods import create, list_methods, method_class
from clipadapt.methods.card import settings_of
from clipadapt.methods.registry import card

QUICK: dict[str, dict[str, Any]] = {
    "backbone-effects-study": {"method": "gda-clip"},
    "clip-adapter": {"epochs": 60},
    "clip-lora": {"batch_size": 16, "lr": 0.01, "min_scale": 1.0, "steps_per_shot": 5},
    "clipood": {"batch_size": 16, "epochs": 8, "lr": 0.0003, "min_scale": 1.0},
    "cocoop": {"batch_size": 4, "epochs": 40, "lr": 0.003},
    "coop": {"class_specific": True, "epochs": 20, "init": "a photo of a", "lr": 0.3},
    "cross-modal-probe": {"steps": 400},
    "eco": {"epochs": 60, "lr": 0.1},
    "fine-tune": {"batch_size": 16, "epochs": 5, "lr": 0.0003, "min_scale": 1.0},
    "flyp": {"batch_size": 16, "epochs": 8, "lr": 0.0003, "min_scale": 1.0},
    "full-fine-tune": {"batch_size": 16, "epochs": 8, "lr": 0.001, "min_scale": 1.0},
    "gopro": {"batch_size": 8, "epochs": 20, "lr": 0.003, "start": "zero", "views": 1},
    "ivlp": {"batch_size": 8, "epochs": 20, "min_scale": 1.0, "n_ctx": 4, "n_visual": 8},
    "kgcoop": {"epochs": 150, "lr": 0.01},
    "m2-mix": {"batch_size": 16, "epochs": 5, "lr": 0.0003},
    "map": {"epochs": 30, "hidden": 64, "lr": 0.05, "min_scale": 1.0, "n_attributes": 2, "n_ctx": 7, "n_visual": 2},
    "maple": {"batch_size": 8, "epochs": 20, "init": None, "min_scale": 1.0, "n_ctx": 6},
    "mocoop": {
        "epochs": 20,
        "groups": [
            ["a photo of a {}.", "a photo of the {}."],
            ["a photo of the large {}."],
            ["a photo of the small {}."],
        ],
        "lr": 0.3,
    },
    "omniview-tuning": {"batch_size": 16, "epochs": 4, "lr": 0.003, "roll": 10.0, "tilt": 20.0, "views": 1},
    "pre": {"epochs": 150, "lr": 0.1},
    "prograd": {"batch_size": 80, "epochs": 150, "lr": 0.02, "n_ctx": 7},
    "promptsrc": {
        "batch_size": 8,
        "epochs": 20,
        "gpa_mean": 20.0,
        "gpa_std": 2.0,
        "image_weight": 1.0,
        "kl_mean": "logits",
        "min_scale": 1.0,
        "n_ctx": 4,
        "n_visual": 8,
        "text_weight": 1.0,
    },
    "r-adapter": {"batch_size": 16, "epochs": 8, "lr": 0.03, "min_scale": 1.0, "rank": 16},
    "reco": {"epochs": 10, "lr": 0.0001},
    "saft": {"batch_size": 16, "epochs": 8, "lr": 0.003, "min_scale": 1.0, "share": 0.01},
    "ship": {
        "encoder_width": 64,
        "epochs": 10,
        "generator_width": 64,
        "method": ("coop", {"batch_size": 8, "epochs": 20, "lr": 0.02, "n_ctx": 6}),
    },
    "sync-clip": {"batch_size": 16, "epochs": 20, "lr": 0.02, "min_scale": 1.0},
    "tai-dpt": {"batch_size": 64, "epochs": 10, "init": "a photo of a", "lr": 0.01, "sentences": 50},
    "tecoa": {"batch_size": 16, "epochs": 5, "lr": 0.0003},
    "vl-adapter": {"batch_size": 16, "epochs": 12, "lr": 0.003},
    "vpt": {"batch_size": 16, "epochs": 40, "lr": 0.01, "min_scale": 1.0},
    "wise-ft": {"alpha": 0.8, "method": ("fine-tune", {"batch_size": 16, "epochs": 5, "lr": 0.0003, "min_scale": 1.0})},
    "x-more": {
        "memory": [
            "a small red star",
            "a large red star",
            "a small green star",
            "a large green star",
            "a small blue star",
            "a large blue star",
        ]
    },
}


# The length of a run that has to run and need not learn anything; for methods that have these hyper-parameters.
SHORT = {"epochs": 2, "steps": 4, "steps_per_shot": 1, "attack_steps": 1}
WHOLE = {"linear-probe": {"steps": 1000}}  # of a solver that complains where it stops earlier
# What `fit_features` needs of a method besides images, labels and texts; rows of features do.
NEEDED = {"x-more": ("memory",)}


def quick(key: str, **more: Any) -> Any:
    """The method called `key` with settings that learn something, and `more`; not fitted."""
    return _created(key, QUICK.get(key, {}) | more, {})


def brief(key: str, **more: Any) -> Any:
    """The method called `key` as `quick` makes it, but with the fewest steps, and `more`; not fitted.

    For tests of anything but what was learned.
    """
    more = WHOLE.get(key, {}) | more
    return _created(key, QUICK.get(key, {}) | more, {name: n for name, n in SHORT.items() if name not in more})


def _created(key: str, settings: dict[str, Any], short: dict[str, int]) -> Any:
    known = settings_of(method_class(key))
    settings = settings | {name: n for name, n in short.items() if name in known}
    if isinstance(settings.get("method"), tuple):
        inner, values = settings["method"]
        settings["method"] = _created(inner, values, short)
    return create(key, **settings)


def keys(**facts: Any) -> list[str]:
    """The keys of the methods whose card has these facts."""
    return [key for key in list_methods() if all(getattr(card(key), name) == value for name, value in facts.items())]
