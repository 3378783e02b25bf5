from __future__ import annotations

import pickle
import sys

import datasets
import pytest
from datasets import ClassLabel, Features, Image, Value

from clipadapt.data import hub_dataset
from clipadapt.errors import DataError

NAMES = ClassLabel(names=["dog", "cat"])


def table(pets, label_type=NAMES, labels=(1, 0), **more):
    paths = [str(pets / "cat/0.png"), str(pets / "dog/1.png")]
    features = {"img": Image(), "kind": label_type} | {name: kind for name, (kind, _) in more.items()}
    columns = {"img": paths, "kind": list(labels)} | {name: values for name, (_, values) in more.items()}
    return datasets.Dataset.from_dict(columns, features=Features(features))


def test_columns_are_found_by_their_types(pets):
    data = hub_dataset(table(pets))
    assert (data.class_names, data.labels) == (["dog", "cat"], [1, 0])
    assert data.items[1].name == "hub data set row 1"
    assert data.items[1].open().getpixel((0, 0)) == (50, 50, 0)


def test_images_stored_in_the_data_set_are_read_without_files(pets):
    source = table(pets).map(lambda row: row, load_from_cache_file=False)
    source = datasets.Dataset.from_list(
        [{"img": {"bytes": (pets / "cat/1.png").read_bytes(), "path": None}, "kind": 0}], features=source.features
    )
    (item,) = hub_dataset(source).items
    assert item.open().getpixel((0, 0)) == (0, 50, 0)
    assert pickle.loads(pickle.dumps(item)).digest() == item.digest()


def test_text_and_integer_labels_are_named_by_the_column(pets):
    texts = hub_dataset(table(pets, Value("string"), ["owl", "ape"]), label="kind")
    assert (texts.class_names, texts.labels) == (["ape", "owl"], [1, 0])
    numbers = hub_dataset(table(pets, Value("int64"), [12, 9]), label="kind")
    assert (numbers.class_names, numbers.labels) == (["9", "12"], [1, 0])


def test_an_id_is_loaded_by_the_library(pets, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kw: asked.append((args, kw)) or table(pets))
    assert hub_dataset("someone/pets", split="test").name == "someone/pets"
    assert asked == [(("someone/pets",), {"split": "test"})]


def test_an_id_that_cannot_be_loaded_is_named(monkeypatch):
    def refuse(*args, **kw):
        raise FileNotFoundError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"'someone/pets' \(split 'train'\) cannot be loaded: Couldn't reach it"):
        hub_dataset("someone/pets")


def test_each_wrong_data_set_has_its_sentence(pets):
    whole = table(pets)
    with pytest.raises(DataError, match="choose one of train, test"):
        hub_dataset(datasets.DatasetDict(train=whole, test=whole))
    with pytest.raises(DataError, match=r"A datasets\.Dataset or a hub id is needed, not IterableDataset"):
        hub_dataset(whole.to_iterable_dataset())
    with pytest.raises(DataError, match="has no column 'label'; its columns are: img, kind"):
        hub_dataset(whole, label="label")
    with pytest.raises(DataError, match="The column 'kind' does not hold images"):
        hub_dataset(whole, image="kind")
    with pytest.raises(DataError, match="0 columns are of type ClassLabel; name one by label=…: img, kind"):
        hub_dataset(table(pets, Value("int64"), [1, 2]))
    with pytest.raises(DataError, match="2 columns are of type ClassLabel"):
        hub_dataset(table(pets, finer=(NAMES, [0, 1])))
    with pytest.raises(DataError, match="row 1 has no label"):
        hub_dataset(table(pets, labels=[0, -1]))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'pip install "clipadapt\[hub\]"'):
        hub_dataset("cifar10")
