"""A benchmark suite: which methods, on which data and backbones, by which protocols; a YAML file, and its cells.

    title: Few shots on small data
    data: [digits, caltech101, my-data.yaml]     # names or paths of definitions (`clipadapt.data.definitions`)
    backbones: [embedded]                        # what `load_backbone` takes; published features bring their own
    protocols:
      few-shot: {shots: [1, 2, 4, 8, 16]}        # a list is one cell for each value
    settings:                                    # hyper-parameters of methods wherever they occur below
      clip-lora: {rank: 4}
    methods:                                     # keys or patterns; a later entry replaces an earlier one's methods
      - {method: "*", sees: features}            # or towers: those that run the model itself
      - {method: "clip-lora", set: {steps_per_shot: 50}, label: clip-lora-quick}    # in addition to `settings`
      - {method: "coop", steps_as: {classes: 10, shots: 8}}  # as many training steps as it would take on these images
    exclude: [cocoop]
    seeds: [1, 2, 3]
    timeout: 600                                 # seconds a cell may take
    tiny: {data: [digits], seeds: [1]}           # what replaces the above under --tiny

A cell is one method on one data set and backbone by one protocol with one set of options and one seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any

from clipadapt.data.definitions.definition import Definition, definition, read_yaml
from clipadapt.errors import ClipadaptError, DataError, unknown_name
from clipadapt.evaluation.choosing import check_grid
from clipadapt.evaluation.protocol import options, protocols
from clipadapt.methods import Method, create, list_methods, method_class
from clipadapt.methods.loading import from_recipe
from clipadapt.methods.recipe import recipe
from clipadapt.methods.registry import card

HERE = Path(__file__).parent / "suites"
_ENTRY = ("method", "sees", "set", "label", "steps_as")
_FIELDS = ("title", "data", "backbones", "protocols", "settings", "methods", "exclude", "seeds", "timeout", "tiny")
# Options of protocols that older results lack: at their defaults they are left out of a cell, which keeps its identity.
_ADDED = ("choose", "tell_new")


@dataclass(frozen=True)
class Entry:
    """A method as a suite runs it: `label` is what it is called in results, `steps_as` is given to `with_steps_of`."""

    label: str
    key: str
    hyperparameters: dict[str, Any]
    steps_as: dict[str, int] | None = None


@dataclass(frozen=True)
class Suite:
    """What is run; see the module's docstring for the fields."""

    name: str
    title: str
    data: list[str]
    protocols: dict[str, dict[str, list[Any]]]
    methods: list[Entry]
    backbones: list[str] = field(default_factory=lambda: ["embedded"])
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    timeout: float = 3600.0


@dataclass(frozen=True)
class Cell:
    """One run, in JSON values; `data` is the name or path of a definition, `backbone` a source or an encoder."""

    data: str
    backbone: str
    published: bool  # whether the backbone is published features of the data set
    protocol: str
    options: dict[str, Any]
    label: str
    method: str
    hyperparameters: dict[str, Any]
    seed: int

    def identity(self, data_fingerprint: str, backbone_fingerprint: str) -> str:
        """16 hex digits that change with everything that may change the result, except the code."""
        facts = [data_fingerprint, backbone_fingerprint, self.protocol, self.options, self.method]
        text = json.dumps([*facts, self.hyperparameters, self.seed], sort_keys=True)
        return blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def stand_in(self) -> Cell:
        """A cell with the same result, the same for all such: shots only draw what some methods do not learn from."""
        learns = card(self.method).signal != "none" or self.options.get("search", False)
        if self.protocol == "few-shot" and not learns:
            return replace(self, options=self.options | {"shots": 1}, seed=1)
        return self


def suites() -> list[str]:
    """The names of the shipped suites, sorted."""
    return sorted(file.stem for file in HERE.glob("*.yaml"))


def load_suite(name: str | Path, *, tiny: bool = False) -> Suite:
    """A shipped suite by its name, or the one in a YAML file; checked as a whole, so that no cell fails for a typo."""
    file = Path(name)
    if file.suffix not in (".yaml", ".yml"):
        if str(name) not in suites():
            raise unknown_name("suite", str(name), suites())
        file = HERE / f"{name}.yaml"
    content: dict[str, Any] = {"backbones": ["embedded"], "seeds": [1, 2, 3]}
    content |= read_yaml(file, "a suite: data, protocols, methods, ...")
    small = content.pop("tiny", {}) or {}
    for key in (*content, *small):
        if key not in _FIELDS:
            raise unknown_name(f"field in {file}", str(key), _FIELDS)
    if tiny:
        content |= small
    for key in ("data", "protocols", "methods"):
        if not content.get(key):
            raise DataError(f"{file} lacks its {key}.")
    return Suite(
        name=file.stem,
        title=str(content.get("title", file.stem)),
        data=[_data(file, name) for name in _list_of(file, content, "data")],
        protocols=_protocols(file, content["protocols"]),
        methods=_methods(
            file, _list_of(file, content, "methods"), _settings_of(file, content), content.get("exclude") or []
        ),
        backbones=[str(source) for source in _list_of(file, content, "backbones")],
        seeds=[int(seed) for seed in _list_of(file, content, "seeds")],
        timeout=float(content.get("timeout", 3600)),
    )


def cells(suite: Suite) -> list[Cell]:
    """All cells, in the order of the file; what can go first is cheap: data, backbone, protocol, options, seed."""
    found = []
    for name in suite.data:
        what = definition(name)
        places = [(encoder, True) for encoder in what.encoders] or [(source, False) for source in suite.backbones]
        for (backbone, published), (key, grid) in product(places, suite.protocols.items()):
            for values in product(*grid.values()):
                chosen = dict(zip(grid, values, strict=True))
                for entry, seed in product(suite.methods, suite.seeds):
                    hyperparameters = _settings(entry, what, chosen, seed, published)
                    found.append(
                        Cell(name, backbone, published, key, chosen, entry.label, entry.key, hyperparameters, seed)
                    )
    return found


def with_steps_of(method: Method, shots: int, classes: int, then: Mapping[str, int]) -> Method:
    """The method with as many training steps on `classes` x `shots` images as it has on those of `then`.

    Its epochs, at least one, follow from its batch size, and so do those of a method that it wraps; steps for each shot
    follow from the shots. `then`: shots and classes. A method that learns from no images is returned unchanged.
    """
    if method.card.signal == "none":
        return method
    values: dict[str, Any] = method.settings
    if values.get("epochs") is not None:
        before, now = then["classes"] * then["shots"], classes * shots
        steps = values["epochs"] * math.ceil(before / values["batch_size"])
        values["epochs"] = max(1, round(steps / math.ceil(now / values["batch_size"])))
    if "steps_per_shot" in values:
        values["steps_per_shot"] = max(1, round(values["steps_per_shot"] * then["shots"] / shots))
    if isinstance(values.get("method"), Method):
        values["method"] = with_steps_of(values["method"], shots, classes, then)
    return create(method.card.key, **values)


def _settings(entry: Entry, what: Definition, options: Mapping[str, Any], seed: int, published: bool) -> dict[str, Any]:
    """A method's hyper-parameters in a cell: the data set's templates and the cell's seed, unless the suite says."""
    names = method_class(entry.key).hyperparameters()
    values = dict(entry.hyperparameters)
    if "seed" in names:
        values.setdefault("seed", seed)
    if not published:
        values.setdefault("templates", what.templates)
    method = from_recipe({"method": entry.key, "hyperparameters": values})
    if entry.steps_as is not None:
        if what.classes is None or "shots" not in options:
            raise DataError(f"{entry.label}: steps_as needs shots and classes; {what.name} or its protocol has none.")
        method = with_steps_of(method, options["shots"], what.classes, entry.steps_as)
    stored = recipe(method)["hyperparameters"]
    return json.loads(json.dumps(stored))


def _data(file: Path, name: Any) -> str:
    """A definition's name, or its path relative to the suite's file."""
    path = Path(str(name))
    if path.suffix in (".yaml", ".yml") and not path.is_absolute():
        path = file.parent / path
        name = path
    definition(str(name))
    return str(name)


def _list_of(file: Path, content: Mapping[str, Any], key: str) -> list[Any]:
    value = content[key]
    value = [value] if isinstance(value, str | int | dict) else value
    if not isinstance(value, list) or not value:
        raise DataError(f"{file}: {key} must be a list.")
    return value


def _protocols(file: Path, content: Any) -> dict[str, dict[str, list[Any]]]:
    if isinstance(content, str | list):
        content = {key: {} for key in ([content] if isinstance(content, str) else content)}
    if not isinstance(content, dict):
        raise DataError(f"{file}: protocols must map a protocol's name to its options.")
    found: dict[str, dict[str, list[Any]]] = {}
    for key, given in content.items():
        if key not in protocols():
            raise unknown_name(f"protocol in {file}", str(key), protocols())
        known = options(key)
        for name in given or {}:
            if name not in known:
                raise unknown_name(f"option of {key} in {file}", str(name), known)
        values = {name: value for name, value in known.items() if name not in _ADDED} | (given or {})
        found[key] = {n: v if isinstance(v, list) else [v] for n, v in values.items()}
        for grid in found[key].get("choose", []):
            check_grid(grid)
    return found


def _settings_of(file: Path, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Hyper-parameters by method."""
    settings = content.get("settings") or {}
    if not isinstance(settings, dict) or not all(isinstance(values, dict) for values in settings.values()):
        raise DataError(f"{file}: settings must map a method's key to its hyper-parameters.")
    for key, values in settings.items():
        if key not in list_methods():
            raise unknown_name(f"method in the settings of {file}", str(key), list_methods())
        _check(file, key, values)
    return settings


def _check(file: Path, key: str, values: dict[str, Any]) -> None:
    try:
        from_recipe({"method": key, "hyperparameters": values})
    except ClipadaptError as error:
        raise DataError(f"{file}: {error}") from None


def _methods(file: Path, content: list[Any], settings: Mapping[str, dict[str, Any]], exclude: list[str]) -> list[Entry]:
    found: dict[str, Entry] = {}
    for given in content:
        given = {"method": given} if isinstance(given, str) else given
        if not isinstance(given, dict) or "method" not in given:
            raise DataError(f"{file}: a method is a key, a pattern, or {{method: ..., set: {{...}}}}, not {given!r}.")
        for name in given:
            if name not in _ENTRY:
                raise unknown_name(f"field of a method in {file}", str(name), _ENTRY)
        keys = list_methods(given["method"])
        if not keys:
            raise unknown_name(f"method in {file}", given["method"], list_methods())
        if given.get("sees", "features") not in ("features", "towers"):
            raise unknown_name(f"sees of {given['method']} in {file}", str(given["sees"]), ("features", "towers"))
        if "sees" in given:
            keys = [k for k in keys if (card(k).kind == "features") == (given["sees"] == "features")]
        then = given.get("steps_as")
        if then is not None and not (
            isinstance(then, dict)
            and set(then) == {"classes", "shots"}
            and all(type(n) is int and n > 0 for n in then.values())
        ):
            raise DataError(f"{file}: steps_as of {given['method']} is {{classes: ..., shots: ...}}, not {then!r}.")
        for key in keys:
            values = settings.get(key, {}) | (given.get("set") or {})
            _check(file, key, values)
            label = given.get("label", key)
            found[label] = Entry(label, key, values, then)
    dropped = {key for pattern in exclude for key in list_methods(pattern)}
    return [entry for entry in found.values() if entry.key not in dropped]
