"""One backbone, one support set and one fit of each method for all conformance tests of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.data import Dataset
from clipadapt.methods import registry
from tests.images import colours
from tests.quick import brief, card
from tests.tiny import tiny_clip

ONLY_HERE: dict[str, Any] = {}  # the methods that are defined in this folder, by key


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of a method come one after the other, so that of several processes mostly one fits it."""
    places = [i for i, item in enumerate(items) if Path(__file__).parent in item.path.parents]
    ordered = sorted((items[i] for i in places), key=lambda item: str(_params(item).get("key", "")))
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


def _params(item: Any) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


@contextmanager
def with_those_of_this_folder() -> Iterator[None]:
    """While it lasts, methods that are defined here are registered; others do not meet them."""
    registry._METHODS.update(ONLY_HERE)
    try:
        yield
    finally:
        for key in [key for key, cls in registry._METHODS.items() if cls.__module__.startswith("tests.conformance.")]:
            ONLY_HERE[key] = registry._METHODS.pop(key)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[Any]:
    with with_those_of_this_folder():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[Any]:  # not a fixture, which those of the session would come before
    with with_those_of_this_folder():
        return (yield)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(autouse=True)
def private_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen features of the few images that all these tests share are encoded once."""
    monkeypatch.setenv("CLIPADAPT_CACHE", str(cache))


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return load_backbone(tiny_clip())


@pytest.fixture(scope="session")
def untouched() -> str:
    """The fingerprint that the backbone must keep, whatever was fitted on it."""
    return load_backbone(tiny_clip()).fingerprint


@pytest.fixture(scope="session")
def support() -> Dataset:
    return colours(4, seed=1)


@pytest.fixture(scope="session")
def queries() -> Dataset:
    return colours(2, seed=2)


@pytest.fixture(scope="session")
def fit() -> Callable[..., Any]:
    """The shortest fit of a method; what learns from unlabelled images gets some."""

    def fit(key: str, backbone: Backbone, support: Dataset | None = None, **more: Any) -> Any:
        if card(key).signal == "unlabelled":
            more["unlabelled"] = colours(3, seed=3)
        return brief(key).fit(backbone, support, **more)

    return fit


@pytest.fixture(scope="session")
def fitted(fit: Callable[..., Any], backbone: Backbone, support: Dataset) -> Callable[[str], Any]:
    """Each method fitted once for all tests that only look at it."""
    return functools.cache(lambda key: fit(key, backbone, support))
