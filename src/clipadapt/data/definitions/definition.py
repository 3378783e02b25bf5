"""Public data sets by name: what each consists of, where a person gets it, and whether a folder holds all of it.

A definition is one YAML file next to this one (or anywhere, given by its path), with

    name, title, licence, source     what it is called, and the page where a person gets it
    layout                           how it is stored on disk, a key of `LAYOUTS`
    places                           part -> paths under the data root, the first that exists is taken
    classes, counts                  how many there are: {train: 4128, val: 1649, test: 2465}
    sha256                           file under `places` -> the first hex digits of its checksum
    templates                        what `class_texts` takes; "photo" if absent
    settings                         what the layout needs besides

`load` reads one into its parts without opening an image, and `check` says exactly what is missing or differs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from PIL import Image

from clipadapt.data.digits import handwritten_digits
from clipadapt.data.examples import Dataset, Split
from clipadapt.data.items import FeatureItem, FileItem, GeneratedItem
from clipadapt.data.readers.coop import coop_split
from clipadapt.data.readers.folders import image_files, image_folder
from clipadapt.data.templates.sets import with_published_names
from clipadapt.errors import DataError, unknown_name

if TYPE_CHECKING:
    import torch

    from clipadapt.data.playground.drawing import Playground

DATA = "CLIPADAPT_DATA"  # the environment variable with the folder of the data sets
HERE = Path(__file__).parent
_FIELDS = ("name", "title", "licence", "source", "layout", "places", "classes", "counts", "sha256", "templates")


@dataclass(frozen=True)
class Definition:
    """What a data set consists of; see the module's docstring for the fields."""

    name: str
    title: str
    layout: str
    licence: str = "not stated"
    source: str = ""
    places: Mapping[str, list[str]] = field(default_factory=dict)
    classes: int | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    templates: Any = "photo"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def generated(self) -> bool:
        """Whether it needs no files."""
        return not self.places

    @property
    def encoders(self) -> list[str]:
        """Of published features, the names of the encoders that they come from."""
        return list(self.places) if self.layout == "features" else []

    def find(self, root: str | Path | None) -> dict[str, Path]:
        """Part -> the path under `root` ($CLIPADAPT_DATA if None); raises DataError that lists what is missing."""
        if self.generated:
            return {}
        root = root or os.environ.get(DATA)
        if root is None:
            raise DataError(f"{self.name} needs files on disk; pass --data FOLDER or set $CLIPADAPT_DATA.")
        found, missing = {}, []
        for part, paths in self.places.items():
            there = [Path(root) / path for path in paths if (Path(root) / path).exists()]
            if there:
                found[part] = there[0]
            else:
                missing.append(f"{part} ({' or '.join(paths)})")
        if missing:
            more = f"; it is at {self.source}" if self.source else ""
            raise DataError(f"{self.name}: {root} lacks {', '.join(missing)}{more}.")
        return found


@dataclass(frozen=True)
class Loaded:
    """A data set's parts; `class_features` (C, D) and `logit_scale` where it is published features."""

    split: Split
    class_features: dict[str, torch.Tensor] | None = None
    logit_scale: float = 100.0


def definitions() -> list[str]:
    """The names of the shipped definitions, sorted."""
    return sorted(file.stem for file in HERE.glob("*.yaml"))


def definition(name: str | Path) -> Definition:
    """A shipped definition by its name, or your own by the path of its YAML file."""
    file = Path(name)
    if file.suffix not in (".yaml", ".yml"):
        if str(name) not in definitions():
            raise unknown_name("data set", str(name), definitions())
        file = HERE / f"{name}.yaml"
    content = read_yaml(file, "a data set: name, title, layout, ...")
    for key in content:
        if key not in (*_FIELDS, "settings"):
            raise unknown_name(f"field in {file}", str(key), (*_FIELDS, "settings"))
    for key in ("name", "title", "layout"):
        if not isinstance(content.get(key), str):
            raise DataError(f"{file} lacks its {key}.")
    if content["layout"] not in LAYOUTS:
        raise unknown_name(f"layout in {file}", content["layout"], LAYOUTS)
    places = {part: [p] if isinstance(p, str) else list(p) for part, p in content.get("places", {}).items()}
    return Definition(**(content | {"places": places}))


def read_yaml(file: Path, fields: str) -> dict[str, Any]:
    """The fields in a YAML file; `fields` says in a message which are meant."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise DataError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise DataError(f"{file} must hold the fields of {fields}")
    return content


def load(name: str | Path | Definition, root: str | Path | None = None, encoder: str | None = None) -> Loaded:
    """The parts of a data set under the folder `root`; no image is opened.

    `encoder` says which published features are meant if a data set has those of several encoders.
    """
    what = name if isinstance(name, Definition) else definition(name)
    if what.encoders:
        if encoder is None:
            encoder = what.encoders[0]
        if encoder not in what.encoders:
            raise unknown_name(f"encoder of {what.name}", encoder, what.encoders)
        found = replace(what, places={encoder: what.places[encoder]}).find(root)
    else:
        found = what.find(root)
    loaded = LAYOUTS[what.layout](what, found)
    parts = [replace(p, name=f"{what.name} {n}") for n, p in _parts(loaded.split).items()]
    return replace(loaded, split=Split(*parts))


def check(name: str | Path | Definition, root: str | Path | None = None) -> list[str]:
    """What is missing or differs under `root`, one sentence each; an empty list where all is as published.

    Counts, checksums and the presence of every image are looked at; images are not opened.
    """
    what = name if isinstance(name, Definition) else definition(name)
    try:
        found = what.find(root)
        splits = {encoder: load(what, root, encoder).split for encoder in what.encoders or [None]}  # type: ignore[list-item]
    except DataError as error:
        return [str(error)]
    problems = []
    for part, expected in what.sha256.items():
        digest = hashlib.sha256(found[part].read_bytes()).hexdigest()
        if not digest.startswith(expected):
            problems.append(f"{found[part]} has the checksum {digest[:12]}, not {expected}: it is another version.")
    for split in splits.values():
        parts = _parts(split)
        classes = len(split.train.class_names)
        if what.classes is not None and classes != what.classes:
            problems.append(f"{what.name} has {classes} classes here, not {what.classes}.")
        for part, expected_count in what.counts.items():
            if len(parts[part]) != expected_count:
                problems.append(f"{what.name} {part} has {len(parts[part]):,} images here, not {expected_count:,}.")
        files = [item.path for data in parts.values() for item in data.items if isinstance(item, FileItem)]
        absent = [path for path in dict.fromkeys(files) if not os.path.exists(path)]
        if absent:
            problems.append(f"{len(absent):,} of {len(set(files)):,} images are missing, the first is {absent[0]}.")
    return list(dict.fromkeys(problems))


def _parts(split: Split) -> dict[str, Dataset]:
    return {"train": split.train, "val": split.val, "test": split.test}


# -- layouts: (definition, part -> path) -> the parts ----------------------------------------------------------------


def _split_file(what: Definition, found: dict[str, Path]) -> Loaded:
    """A `split_zhou_*.json` file and the folder of its images."""
    return Loaded(coop_split(found["split"], root=found["images"]))


def _aircraft(what: Definition, found: dict[str, Path]) -> Loaded:
    """FGVC Aircraft: `images_variant_{train,val,test}.txt` lists of "image-id variant name"."""
    folder = found["lists"]
    names = [line.strip() for line in (folder / "variants.txt").read_text().splitlines() if line.strip()]

    def part(name: str) -> Dataset:
        rows = [line.split(maxsplit=1) for line in (folder / f"images_variant_{name}.txt").read_text().splitlines()]
        items = [FileItem(str(found["images"] / f"{image}.jpg")) for image, _ in rows]
        try:
            return Dataset([*items], [names.index(variant.strip()) for _, variant in rows], names, name=name)
        except ValueError as error:
            raise DataError(f"{folder}/images_variant_{name}.txt: {error} of variants.txt.") from None

    return Loaded(Split(part("train"), part("val"), part("test")))


def _classnames(file: Path) -> dict[str, str]:
    """Lines "n01440764 tench" -> folder: class name, in the order of the file, which is that of the labels."""
    rows = [line.strip().split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    bad = [row for row in rows if len(row) != 2]
    if bad or not rows:
        raise DataError(f'{file} must have lines such as "n01440764 tench", not {" ".join(bad[0]) if bad else "none"}.')
    return {row[0]: row[1] for row in rows}


def _by_folder(root: Path, names: Mapping[str, str], what: str, numbered: bool = False) -> Dataset:
    """Images of the folders that exist under `root`; classes without one are left out."""
    folders = [str(i) for i in range(len(names))] if numbered else list(names)
    present = [(f, n) for f, n in zip(folders, names.values(), strict=True) if (root / f).is_dir()]
    if not present:
        raise DataError(f"{root} has none of the class folders of {what}, such as {folders[0]}.")
    items, labels = [], []
    for label, (folder, _) in enumerate(present):
        files = image_files(root / folder)
        items += [FileItem(file) for file in files]
        labels += [label] * len(files)
    return Dataset([*items], labels, [name for _, name in present], name=what)


def _imagenet(what: Definition, found: dict[str, Path]) -> Loaded:
    """`train/` and `val/` with a folder for each class, and classnames.txt; val is the test part too, as published."""
    names = _classnames(found["classnames"])
    train, val = (_by_folder(found["images"] / part, names, what.name) for part in ("train", "val"))
    return Loaded(Split(train, val, val))


def _imagenet_variant(what: Definition, found: dict[str, Path]) -> Loaded:
    """A test set of ImageNet's classes, or some of them, each in a folder; there is nothing to learn from."""
    names = _classnames(found["classnames"])
    test = _by_folder(found["images"], names, what.name, numbered=bool(what.settings.get("numbered")))
    return Loaded(Split(test.select([]), test.select([]), test))


def _folders(what: Definition, found: dict[str, Path]) -> Loaded:
    """One sub-folder for each class, cut into 50 % train, 20 % val, 30 % test by class (CoOp's own rule), seed 1."""
    data = image_folder(found["images"])
    if "published_names" in what.settings:
        data = with_published_names(data, what.settings["published_names"])
    return Loaded(_cut(data))


def _cut(data: Dataset, val: float = 0.2, test: float = 0.3) -> Split:
    rest, tested = data.split(test=test, seed=1)
    train, held_out = rest.split(test=val / (1 - test), seed=1)
    return Split(train, held_out, tested)


def _digits(what: Definition, found: dict[str, Path]) -> Loaded:
    return Loaded(_cut(handwritten_digits()))


def _features(what: Definition, found: dict[str, Path]) -> Loaded:
    """An .npz of image_features (N, D), labels (N,), class_names (C,), mean_prompt_features (C, D)."""
    import torch
    from torch.nn.functional import normalize

    ((encoder, file),) = found.items()
    with np.load(file, allow_pickle=False) as content:
        try:
            features = normalize(torch.from_numpy(content["image_features"]).float(), dim=1)
            labels, names = content["labels"].tolist(), [str(name) for name in content["class_names"]]
            texts = torch.from_numpy(content["mean_prompt_features"]).float()
        except KeyError as error:
            raise DataError(f"{file} lacks the array {error}.") from None
    items = [FeatureItem(f"{encoder} row {i}", row) for i, row in enumerate(features)]
    split = _cut(Dataset([*items], labels, names, name=what.name), **what.settings.get("cut", {}))
    return Loaded(split, dict(zip(names, texts, strict=True)), float(what.settings.get("logit_scale", 100.0)))


def _playground(what: Definition, found: dict[str, Path]) -> Loaded:
    """Drawn images of things, labelled by kind or by colour and kind; each part comes from a different world."""
    from clipadapt.data.playground.drawing import TRAIN_KINDS, TRAIN_STYLES, VERSION, Playground

    given = what.settings
    kinds = tuple(given.get("kinds", TRAIN_KINDS))
    colours = given.get("colours")
    styles = {part: tuple(given.get("styles", {}).get(part, TRAIN_STYLES)) for part in ("train", "val", "test")}
    size = int(given.get("size", 64))
    seeds = {"train": 1, "val": 3, "test": 2} | given.get("seeds", {})

    def part(name: str) -> Dataset:
        world = Playground(size=size, kinds=kinds, styles=styles[name], seed=int(seeds[name]))
        count = int(given[name])
        if colours is None:
            return world.dataset(count)
        names = [f"{colour} {kind}" for kind, colour in product(kinds, colours)]
        items, labels, domains = [], [], []
        for i, (label, (kind, colour)) in product(range(count), enumerate(product(kinds, colours))):
            style, index = styles[name][i % len(styles[name])], i * len(names) + label
            fixed = {"kind": kind, "colour": colour, "style": style}
            key = f"playground {VERSION} {world} {index} {fixed}"
            items.append(GeneratedItem(f"{style}/{names[label]}/{i}", key, partial(_scene, world, index, fixed)))
            labels.append(label)
            domains.append(style)
        return Dataset([*items], labels, names, domains, name=what.name)

    return Loaded(Split(part("train"), part("val"), part("test")))


def _scene(world: Playground, index: int, fixed: dict[str, Any]) -> Image.Image:
    return world.scene(index, **fixed).image


def _domain_folders(what: Definition, found: dict[str, Path]) -> Loaded:
    """A folder for each domain, with a folder for each class in it (PACS, VLCS, Office-Home, DomainNet)."""
    root = found["images"]
    names = what.settings.get("domains") or sorted(p.name for p in root.iterdir() if p.is_dir())
    read = {name: image_folder(root / name) for name in names}
    classes = sorted({c for data in read.values() for c in data.class_names})
    rows = [
        (item, classes.index(data.class_names[label]), name)
        for name, data in read.items()
        for item, label in zip(data.items, data.labels, strict=True)
    ]
    items, labels, domains = (list(column) for column in zip(*rows, strict=True))
    return Loaded(_cut(Dataset(items, labels, classes, domains, name=what.name)))


Layout = Callable[[Definition, dict[str, Path]], Loaded]
LAYOUTS: dict[str, Layout] = {
    "split-file": _split_file,
    "aircraft": _aircraft,
    "imagenet": _imagenet,
    "imagenet-variant": _imagenet_variant,
    "folders": _folders,
    "domain-folders": _domain_folders,
    "digits": _digits,
    "features": _features,
    "playground": _playground,
}
