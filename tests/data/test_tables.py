from __future__ import annotations

import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List

from clipadapt.data import BytesItem, MultiLabelDataset, image_table
from clipadapt.errors import DataError

GOOD = "image,label\ncat/0.png,cat\ndog/0.png,dog\ncat/1.png,cat\n"


def write(pets, text, name="table.csv", encoding="utf-8"):
    (pets / name).write_text(text, encoding=encoding, newline="")
    return pets / name


@pytest.mark.parametrize(
    ("text", "name", "encoding"),
    [
        (GOOD, "table.csv", "utf-8"),
        (GOOD, "spreadsheet.csv", "utf-8-sig"),
        (GOOD.replace("\n", "\r\n"), "windows.csv", "utf-8"),
        (GOOD.replace(",", "\t"), "table.tsv", "utf-8"),
        (GOOD.replace("cat/0.png,cat", '"cat/0.png", cat '), "quoted.csv", "utf-8"),
    ],
)
def test_csv_in_its_usual_dresses(pets, text, name, encoding):
    data = image_table(write(pets, text, name, encoding))
    assert data.class_names == ["cat", "dog"]
    assert data.labels == [0, 1, 0]
    assert data.paths == [str(pets / "cat/0.png"), str(pets / "dog/0.png"), str(pets / "cat/1.png")]
    assert data.items[1].open().getpixel((0, 0)) == (50, 0, 0)


def test_other_columns_and_domains(pets):
    table = write(pets, "id,file,what,where\n1,cat/0.png,7,home\n2,dog/0.png,12,zoo\n")
    data = image_table(table, image="file", label="what", domain="where")
    assert (data.class_names, data.labels, data.domains) == (["7", "12"], [0, 1], ["home", "zoo"])


def test_absolute_paths_are_taken_as_they_are(pets, tmp_path):
    table = write(tmp_path, f"image,label\n{pets}/cat/0.png,cat\n")
    assert image_table(table).paths == [str(pets / "cat/0.png")]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"table\.csv has no column 'image'; its columns are: none"),
        ("image;label\n", r"has no column 'image'; its columns are: image;label"),
        ("image,class\na,b\n", r"has no column 'label'; its columns are: image, class"),
        ("image,label,label\na,b,c\n", r"has 2 columns named 'label'; one is needed"),
        ("image,label\n", r"has no rows below its column names"),
        ("image,label\ncat/0.png,cat\ncat/1.png\n", r"table\.csv row 3 has 1 cells where 2 are expected"),
        ("image,label\ncat/0.png,cat,\n", r"table\.csv row 2 has 3 cells where 2 are expected"),
        ("image,label\ncat/0.png,cat\ncat/1.png,\n", r"table\.csv row 3: the column 'label' is empty"),
        ("image,label\n,cat\n", r"table\.csv row 2: the column 'image' is empty"),
        ("image,label\ncat/9.png,cat\n", r"table\.csv row 2: .*9\.png does not exist; paths are relative to the table"),
        ('image,label\n"cat/0.png,cat\n', r"cannot be read as UTF-8 CSV"),
    ],
)
def test_each_wrong_csv_has_its_sentence(pets, text, sentence):
    with pytest.raises(DataError, match=sentence):
        image_table(write(pets, text))


def test_wrong_files_have_their_sentences(pets):
    with pytest.raises(DataError, match=r"none\.csv does not exist"):
        image_table(pets / "none.csv")
    with pytest.raises(DataError, match=r"table\.xlsx is not a table that can be read; \.csv, \.tsv or \.parquet"):
        image_table(write(pets, GOOD, "table.xlsx"))
    with pytest.raises(DataError, match="cannot be read as UTF-8 CSV"):
        image_table(write(pets, GOOD.replace("dog", "düg"), encoding="latin-1"))
    with pytest.raises(DataError, match=r"table\.parquet cannot be read as Parquet"):
        image_table(write(pets, GOOD, "table.parquet"))


def test_parquet_of_paths(pets):
    columns = {"image": ["cat/0.png", "dog/0.png"], "label": [3, 1], "other": [0.5, 0.5]}
    pa.parquet.write_table(pa.table(columns), pets / "t.parquet")
    data = image_table(pets / "t.parquet")
    assert (data.class_names, data.labels) == (["1", "3"], [1, 0])
    assert data.paths == [str(pets / "cat/0.png"), str(pets / "dog/0.png")]


def test_parquet_of_encoded_images(pets):
    images = [(pets / "cat/0.png").read_bytes(), (pets / "dog/1.png").read_bytes()]
    pa.parquet.write_table(pa.table({"image": images, "label": ["cat", "dog"]}), pets / "t.parquet")
    data = image_table(pets / "t.parquet")
    assert isinstance(data.items[1], BytesItem)
    assert data.paths[1] == f"{pets / 't.parquet'} row 2"
    assert data.items[1].open().getpixel((0, 0)) == (50, 50, 0)


def test_parquet_written_by_datasets_brings_its_class_names(pets):
    features = Features({"image": Image(), "label": ClassLabel(names=["dog", "cat"])})
    rows = {"image": [str(pets / "cat/0.png"), str(pets / "dog/1.png")], "label": [1, 0]}
    Dataset.from_dict(rows, features=features).to_parquet(pets / "t.parquet")
    data = image_table(pets / "t.parquet")
    assert (data.class_names, data.labels) == (["dog", "cat"], [1, 0])
    assert data.items[1].open().getpixel((0, 0)) == (50, 50, 0)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"image": ["a.png"]}, "has no column 'label'; its columns are: image"),
        ({"image": ["cat/0.png", None], "label": [1, 2]}, r"t\.parquet row 2: the column 'image' is empty"),
        ({"image": ["cat/0.png"], "label": [float("nan")]}, r"t\.parquet row 1: the column 'label' is empty"),
        ({"image": [7], "label": [1]}, r"t\.parquet row 1: a path or an encoded image is needed, not int"),
        ({"image": ["cat/7.png"], "label": [1]}, r"t\.parquet row 1: .*7\.png does not exist"),
    ],
)
def test_each_wrong_parquet_has_its_sentence(pets, columns, sentence):
    pa.parquet.write_table(pa.table(columns), pets / "t.parquet")
    with pytest.raises(DataError, match=sentence):
        image_table(pets / "t.parquet")


def test_a_missing_extra_is_named(pets, monkeypatch):
    pa.parquet.write_table(pa.table({"image": ["cat/0.png"], "label": [1]}), pets / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'pip install "clipadapt\[tables\]"'):
        image_table(pets / "t.parquet")


# -- several labels an image ------------------------------------------------------------------------------------------

SEVERAL = "image,label,where\ncat/0.png,pet;asleep,home\ndog/0.png, pet ; , zoo\ncat/1.png,,zoo\n"
ONE_HOT = "where,image,pet,asleep\nhome,cat/0.png,1,1\nzoo,dog/0.png,1,0\nzoo,cat/1.png,0,0\n"


@pytest.mark.parametrize(
    ("text", "name", "separator"),
    [
        (SEVERAL, "table.csv", ";"),
        (SEVERAL.replace(",", "\t"), "table.tsv", ";"),
        (SEVERAL.replace(";", "|"), "bars.csv", "|"),
        (SEVERAL.replace("pet;asleep", "pet;asleep;pet"), "twice.csv", ";"),
        (SEVERAL.replace("pet;asleep", '"pet,asleep"').replace(";", ""), "quoted.csv", ","),
    ],
)
def test_several_labels_in_a_cell(pets, text, name, separator):
    data = image_table(write(pets, text, name), domain="where", multi_label=True, separator=separator)
    assert isinstance(data, MultiLabelDataset)
    assert (data.class_names, data.labels) == (["asleep", "pet"], [{0, 1}, {1}, set()])
    assert (data.domains, data.name) == (["home", "zoo", "zoo"], name.split(".")[0])
    assert data.paths == [str(pets / "cat/0.png"), str(pets / "dog/0.png"), str(pets / "cat/1.png")]


def test_a_column_for_each_class(pets):
    data = image_table(write(pets, ONE_HOT), domain="where", multi_label=True)
    assert (data.class_names, data.labels) == (["pet", "asleep"], [{0, 1}, {0}, set()])
    assert (data.paths[1], data.domains) == (str(pets / "dog/0.png"), ["home", "zoo", "zoo"])


@pytest.mark.parametrize(
    ("columns", "names", "labels"),
    [
        ({"label": ["pet;asleep", None]}, ["asleep", "pet"], [{0, 1}, set()]),
        ({"label": [["pet", "asleep"], []]}, ["asleep", "pet"], [{0, 1}, set()]),
        ({"label": [["a;b"], None]}, ["a;b"], [{0}, set()]),  # a name in a list is taken as it is
        ({"label": [[10, 9], [9]]}, ["9", "10"], [{0, 1}, {0}]),
        ({"label": [7, 12]}, ["7", "12"], [{0}, {1}]),
        ({"pet": [1, 0], "asleep": [True, False], "old": [1.0, 0.0]}, ["pet", "asleep", "old"], [{0, 1, 2}, set()]),
    ],
)
def test_several_labels_in_parquet(pets, columns, names, labels):
    images = [(pets / "cat/0.png").read_bytes(), (pets / "dog/1.png").read_bytes()]
    pa.parquet.write_table(pa.table({"image": images, **columns}), pets / "t.parquet")
    data = image_table(pets / "t.parquet", multi_label=True)
    assert (data.class_names, data.labels) == (names, labels)
    assert data.items[1].open().getpixel((0, 0)) == (50, 50, 0)


def test_lists_of_labels_written_by_datasets_bring_their_class_names(pets):
    features = Features({"image": Image(), "label": List(ClassLabel(names=["pet", "asleep", "old"]))})
    rows = {"image": [str(pets / "cat/0.png"), str(pets / "dog/1.png")], "label": [[1, 0], []]}
    Dataset.from_dict(rows, features=features).to_parquet(pets / "t.parquet")
    data = image_table(pets / "t.parquet", multi_label=True)
    assert (data.class_names, data.labels) == (["pet", "asleep", "old"], [{0, 1}, set()])
    table = pa.parquet.read_table(pets / "t.parquet")
    wrong = table.set_column(1, "label", pa.array([[1], [3]])).replace_schema_metadata(table.schema.metadata)
    pa.parquet.write_table(wrong, pets / "t.parquet")
    with pytest.raises(DataError, match=r"row 2: .* holds 3; indices into its 3 class names are needed"):
        image_table(pets / "t.parquet", multi_label=True)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("image\ncat/0.png\n", r"table\.csv has no column 'label'; its columns are: image"),
        ("file,pet\ncat/0.png,1\n", r"table\.csv has no column 'image'; its columns are: file, pet"),
        ("image,label\ncat/0.png,\n", r"table\.csv: no row has a label in the column 'label'"),
        ("image,label\n,pet\n", r"table\.csv row 2: the column 'image' is empty"),
        ("image,pet\ncat/0.png,1\ncat/1.png,\n", r"table\.csv row 3: the column 'pet' is empty"),
        ("image,pet,pet\ncat/0.png,1,1\n", r"has 2 columns named 'pet'; one is needed"),
        (
            "image,tags\ncat/0.png,pet;old\n",
            r"table\.csv row 2: the column 'tags' holds 'pet;old'; "
            r"as there is no column 'label', every other column is a class and holds 0 or 1",
        ),
    ],
)
def test_each_wrong_table_of_several_labels_has_its_sentence(pets, text, sentence):
    with pytest.raises(DataError, match=sentence):
        image_table(write(pets, text), multi_label=True)


def test_wrong_cells_and_separators_have_their_sentences(pets):
    pa.parquet.write_table(pa.table({"image": ["cat/0.png"] * 2, "label": [["pet"], [None]]}), pets / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet row 2: the column 'label' holds None; class names are needed"):
        image_table(pets / "t.parquet", multi_label=True)
    with pytest.raises(DataError, match=r"The separator between labels is empty"):
        image_table(write(pets, SEVERAL), multi_label=True, separator="")


def test_a_folder_that_holds_its_table(pets):
    table = write(pets, SEVERAL, "labels.csv")
    data = image_table(pets, multi_label=True)
    assert (data.name, data.paths[1]) == ("pets", str(pets / "dog/0.png"))
    assert data.labels == image_table(table, multi_label=True).labels
    table.unlink()
    write(pets, GOOD.replace(",", "\t"), "labels.tsv")
    assert image_table(pets).labels == [0, 1, 0]


def test_a_folder_holds_one_table(pets):
    with pytest.raises(DataError, match=r"pets holds no table; one of labels\.csv, labels\.tsv, labels\.parquet is"):
        image_table(pets)
    write(pets, GOOD, "labels.csv")
    write(pets, GOOD, "labels.tsv")
    with pytest.raises(DataError, match=r"pets holds labels\.csv and labels\.tsv; one of"):
        image_table(pets)
