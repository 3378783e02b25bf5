"""The catalogue says what the cards say."""

import json

from clipadapt.methods import list_methods, method_class


def test_every_method_is_listed_with_its_paper(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run("methods").stdout
    for key in list_methods():
        assert key in text
        assert method_class(key).card.title in text


def test_a_glob_selects(run):
    entries = json.loads(run("methods", "tip-*", "--json").stdout)
    assert [entry["key"] for entry in entries] == list_methods("tip-*")


def test_an_exact_key_shows_its_hyper_parameters(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = run("methods", "tip-adapter").stdout
    assert "2207.09519" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("beta"))
    assert row.split()[:4] == ["beta", "5.5", "≥", "0"]
    (entry,) = json.loads(run("methods", "tip-adapter", "--json").stdout)
    beta = next(p for p in entry["hyperparameters"] if p["name"] == "beta")
    assert (beta["default"], beta["low"], beta["high"]) == (5.5, 0, None)


def test_unknown_names_are_errors(run):
    assert "did you mean 'tip-adapter'" in run("methods", "tipadapter", code=1).stderr
    assert "matches 'q*'" in run("methods", "q*", code=1).stderr
