"""Methods are found by key, glob and near names."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

import clipadapt
from clipadapt.errors import ClipadaptError
from clipadapt.methods import Classifier, FeatureMethod, catalogue, create, list_methods, method
from clipadapt.methods.catalogue import cards, module_of
from clipadapt.methods.registry import card


def test_globbing():
    assert list_methods("tip-*") == ["tip-adapter", "tip-adapter-f"]
    assert set(list_methods("*adapter*")) >= {"clip-adapter", "tip-adapter", "tip-adapter-f"}
    assert list_methods("no-such-*") == []
    assert list_methods() == sorted(list_methods())
    assert clipadapt.list_methods is list_methods


@pytest.mark.parametrize(
    ("key", "near"), [("tipadapter", "'tip-adapter'"), ("gda", "'gda-clip'"), ("lora", "'clip-lora'")]
)
def test_unknown_keys_suggest_near_ones(key, near):
    with pytest.raises(ClipadaptError, match=near):
        create(key)


def test_unknown_hyperparameters_suggest_near_ones():
    with pytest.raises(ClipadaptError, match=r"tip-adapter: .*'alfa'.*'alpha'"):
        create("tip-adapter", alfa=1.0)


def test_a_key_can_be_taken_only_once():
    with pytest.raises(ValueError, match="Two methods are called 'zero-shot'"):

        @method("zero-shot", title="", arxiv=None)
        class Impostor(FeatureMethod, Classifier):
            pass


def test_cards_are_read_without_importing_methods():
    code = (
        "import sys; from clipadapt.methods.registry import card, list_methods; "
        "print(card('tip-adapter').title, len(list_methods()), 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said == f"{card('tip-adapter').title} {len(cards())} False\n"


def test_a_file_is_found_by_its_key():
    assert module_of("no-such-method") is None
    assert module_of("lp++") == "clipadapt.methods.feature_adapter.lp_plus_plus"
    assert all(module_of(key) for key in cards())


def test_a_method_is_a_dataclass_of_its_settings():
    chosen = create("tip-adapter", alpha=2.0)
    assert repr(chosen) == "TipAdapter(templates='photo', alpha=2.0, beta=5.5)"
    assert chosen == create("tip-adapter", alpha=2.0) != create("tip-adapter")
    assert dataclasses.replace(chosen, beta=1.0).alpha == 2.0


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            '@method("faulty", titel="")\nclass Faulty(FeatureMethod, Classifier):\n    pass\n',
            "the card of 'faulty'.*titel",
        ),
        ('@method(KEY, title="")\nclass Faulty(FeatureMethod, Classifier):\n    pass\n', "literals"),
        ('@method("other", title="")\nclass Faulty(FeatureMethod, Classifier):\n    pass\n', r"must be other\.py"),
    ],
)
def test_a_faulty_card_names_its_file(code, says, tmp_path, monkeypatch):
    folder = tmp_path / "feature_adapter"
    folder.mkdir()
    (folder / "faulty.py").write_text(code)
    monkeypatch.setattr(catalogue, "ROOT", tmp_path)
    catalogue._files.cache_clear()
    catalogue.cards.cache_clear()
    try:
        with pytest.raises(ClipadaptError, match=rf"faulty\.py: .*{says}"):
            catalogue.cards()
    finally:
        monkeypatch.undo()
        catalogue._files.cache_clear()
        catalogue.cards.cache_clear()


def test_a_method_needs_a_task():
    with pytest.raises(ValueError, match="no-task has no task"):

        @method("no-task", title="")
        class NoTask(FeatureMethod):
            pass
