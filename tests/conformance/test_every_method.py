"""What every method must do, whatever its task: its file, its card and its hyper-parameters."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import clipadapt
from clipadapt.errors import ClipadaptError
from clipadapt.methods import catalogue, create, method_class
from clipadapt.methods.card import KINDS, TASKS, settings_of
from tests.quick import QUICK, brief, quick

KEYS = list(catalogue.cards())
CAPABILITIES = {"texts", "patches", "prompts", "attention", "gradients", "weights", "causal-text", "class-token"}


@pytest.mark.parametrize("key", KEYS)
def test_card(key):
    cls = method_class(key)
    card = cls.card
    assert catalogue.cards()[key] == card, "the card that is read of the file is that of the class"
    assert card.key == key == key.lower()
    assert card.title
    assert card.problem
    assert card.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", card.arxiv)
    assert card.signal in ("none", "labels", "unlabelled")
    assert card.unlabelled or card.signal != "unlabelled"
    assert card.requires <= CAPABILITIES


@pytest.mark.parametrize("key", KEYS)
def test_a_method_is_one_kind_and_one_task(key):
    """A kind that adapts at test time may join one other; wrappers and methods do not inherit from methods."""
    cls = method_class(key)
    homes = {base.__name__: base.__module__.split(".")[2] for base in cls.__bases__}
    kinds, tasks = ([name for name, home in homes.items() if home == which] for which in ("kinds", "tasks"))
    assert len(kinds) + len(tasks) == len(homes)
    assert len(tasks) == 1
    assert len(kinds) == 1 + ("TestTimeMethod" in kinds and len(kinds) > 1)
    assert cls.card.task == cls.task == TASKS[tasks[0]]
    assert cls.card.kind == cls.kind == KINDS[next(c.__name__ for c in cls.__mro__ if c.__name__ in KINDS)]["kind"]


@pytest.mark.parametrize("key", KEYS)
def test_a_file_is_named_after_its_key_and_its_folder_after_the_family(key):
    cls = method_class(key)
    file = Path(inspect.getfile(cls))
    assert file.stem == key.replace("++", "_plus_plus").replace("-", "_")
    assert file.parent.name == cls.card.family.replace("-", "_")
    assert file.parent.parent == catalogue.ROOT


@pytest.mark.parametrize("key", KEYS)
def test_the_docstring_cites_the_paper(key):
    cls = method_class(key)
    assert cls.__doc__
    assert cls.card.arxiv is None or cls.card.arxiv in (inspect.getmodule(cls).__doc__ or "")


@pytest.mark.parametrize("key", KEYS)
def test_a_method_imports_no_other_method(key):
    """What two methods share is in `nn`, `losses`, `training` or the kind."""
    families = {card.family.replace("-", "_") for card in catalogue.cards().values()}
    tree = ast.parse(Path(inspect.getfile(method_class(key))).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not getattr(node, "level", 0), "imports are absolute"
        for name in names:
            assert not families.intersection(name.split(".")[2:3]) or not name.startswith("clipadapt.methods."), name


@pytest.mark.parametrize("key", KEYS)
def test_hyperparameters(key):
    cls = method_class(key)
    assert cls.hyperparameters() == list(create(key).settings) == list(settings_of(cls))
    for name, field in settings_of(cls).items():
        assert field.metadata.get("doc"), f"{key}: {name} says what it is"
    for name, values in cls.search_space.items():
        for value in values:
            assert create(key, **{name: value}).settings[name] == value
    assert set(QUICK.get(key, {})) <= set(quick(key).settings) == set(brief(key).settings)


@pytest.mark.parametrize("key", KEYS)
def test_bad_hyperparameters_are_refused_by_name(key):
    with pytest.raises(ClipadaptError, match="no_such_setting"):
        create(key, no_such_setting=1)
    for name, field in settings_of(method_class(key)).items():
        bounds = (field.metadata.get("low"), -1), (field.metadata.get("high"), 1)
        wrong: list = [bound + beyond for bound, beyond in bounds if bound is not None]
        for value in [*wrong, "nonsense"] if wrong or field.metadata.get("choices") else []:
            with pytest.raises(ClipadaptError, match=rf"{re.escape(key)}: {name} = "):
                create(key, **{name: value})


@pytest.mark.parametrize("key", KEYS)
def test_unfitted_says_so(key, tmp_path):
    model = create(key)
    with pytest.raises(ClipadaptError, match="not fitted"):
        _ = model.trained_parameters
    with pytest.raises(ClipadaptError, match="not fitted"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert clipadapt.list_methods(key) == [key]
