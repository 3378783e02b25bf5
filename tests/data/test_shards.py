from __future__ import annotations

import io
import json
import pickle
import tarfile

import pytest
import webdataset as wds
from PIL import Image

from clipadapt.data import webdataset
from clipadapt.errors import ClipadaptError, DataError


def write(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_shards_written_by_the_library_are_read_in_place(tmp_path):
    for number in range(2):
        with wds.TarWriter(str(tmp_path / f"pets-{number}.tar")) as writer:
            for index in range(3):
                image = Image.new("RGB", (8, 8), (number * 100, index * 100, 0))
                writer.write({"__key__": f"sample{index}", "png": image, "cls": index % 2})
    data = webdataset(tmp_path / "pets-*.tar", class_names=["cat", "dog"])
    assert (data.class_names, data.labels) == (["cat", "dog"], [0, 1, 0] * 2)
    assert data.paths[4] == f"{tmp_path / 'pets-1.tar'}:sample1.png"
    assert [item.open().getpixel((0, 0)) for item in data.items[::-2]] == [(100, 200, 0), (100, 0, 0), (0, 100, 0)]
    assert pickle.loads(pickle.dumps(data.items[5])).digest() == data.items[5].digest()
    assert webdataset([tmp_path / "pets-1.tar", tmp_path / "pets-0.tar"]).class_names == ["0", "1"]


def test_labels_in_json_and_text(tmp_path, png):
    files = {"x/1.json": b'{"label": "owl", "kind": 3}', "x/1.mask.png": b"", "x/1.PNG": png((9, 0, 0))}
    by_name = write(tmp_path / "a.tar", files)
    data = webdataset(by_name)
    assert (data.class_names, data.paths) == (["owl"], [f"{by_name}:x/1.PNG"])
    assert webdataset(by_name, label="kind").class_names == ["3"]
    assert webdataset(write(tmp_path / "b.tar", {"1.cls": b"ape\n", "1.png": png((0, 0, 0))})).class_names == ["ape"]


def test_samples_without_an_image_are_left_out(tmp_path, png):
    shard = write(tmp_path / "a.tar", {"1.txt": b"caption", "2.png": png((0, 0, 0)), "2.cls": b"0"})
    assert len(webdataset(shard)) == 1


def test_each_wrong_shard_has_its_sentence(tmp_path, png):
    image = {"1.png": png((0, 0, 0))}
    with pytest.raises(DataError, match=r"none-\*\.tar names no shard"):
        webdataset(tmp_path / "none-*.tar")
    with pytest.raises(DataError, match="An empty list names no shard"):
        webdataset([])
    with pytest.raises(DataError, match=r"a\.tar, sample '1' has no label; a \.cls file or a \.json file with"):
        webdataset(write(tmp_path / "a.tar", image))
    with pytest.raises(DataError, match=r"sample '1' has no label"):
        webdataset(write(tmp_path / "a.tar", image | {"1.json": json.dumps({"class": 1}).encode()}))
    with pytest.raises(DataError, match=r"sample '1': its \.json is not valid"):
        webdataset(write(tmp_path / "a.tar", image | {"1.json": b"{"}))
    with pytest.raises(DataError, match=r"b\.tar\.gz cannot be read as an uncompressed tar file"):
        webdataset(write(tmp_path / "b.tar.gz", image, "w:gz"))
    with pytest.raises(DataError, match="shards holds no image"):
        webdataset(write(tmp_path / "c.tar", {"1.txt": b"x"}))
    with pytest.raises(ClipadaptError, match="Unknown class 'gnu'"):
        webdataset(write(tmp_path / "d.tar", image | {"1.cls": b"gnu"}), class_names=["cat"])


def test_a_shard_cut_short_is_refused(tmp_path, png):
    files = {}
    for i in range(40):
        files |= {f"{i}.png": png((i, 0, 0)), f"{i}.cls": b"0"}
    shard = write(tmp_path / "cut.tar", files)
    shard.write_bytes(shard.read_bytes()[:20_000])
    with pytest.raises(DataError, match=r"cut\.tar cannot be read as an uncompressed tar file"):
        webdataset(shard)
