"""The routes: answers equal the library's own, batches and towers are shared, models change while they are asked."""

import asyncio
import base64
import itertools
import json
import shutil
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import clipadapt
from clipadapt.data import BytesItem
from clipadapt.search.index import Index
from clipadapt.search.query import query_vector
from clipadapt.serve.models import EncodedImage, Explain, Models, Why
from tests.images import colours
from tests.quick import quick
from tests.serve.conftest import files, png, serving, together
from tests.tiny import tiny_clip

CLASSIFY = "/v1/classify"


def probabilities(result):
    return {entry["class"]: entry["probability"] for entry in result["predictions"]}


def local(folder, images):
    model = clipadapt.load(folder)
    rows = model.predict_proba([BytesItem("local", image) for image in images])
    return [dict(zip(model.class_names_, row.tolist(), strict=True)) for row in rows]


def test_served_predictions_are_the_local_ones(ask, folders):
    for folder in (folders.pets, folders.more):
        answer = ask("POST", CLASSIFY, files=files(*folders.images), data={"model": folder.name, "top": "99"}).json()
        assert answer["model"] == folder.name
        served = [probabilities(result) for result in answer["results"]]
        for ours, theirs in zip(served, local(folder, folders.images), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
            assert [*ours.values()] == sorted(ours.values(), reverse=True)


def test_a_image_that_cannot_be_read_has_its_error_in_its_place(ask, folders):
    answer = ask("POST", CLASSIFY, files=files(folders.images[0], b"no image", folders.images[0][:200]))
    good, none, cut = answer.json()["results"]
    assert answer.status_code == 200
    assert len(good["predictions"]) == 4
    assert none["error"].startswith("Image 2 is not an image")
    assert cut["error"].startswith("Image 3 is a damaged or truncated image")


def test_only_unreadable_images_are_a_bad_request(ask):
    answer = ask("POST", CLASSIFY, files=files(b""))
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert answer.json()["error"]["message"] == "The image is empty (0 bytes); an image file is needed."


def test_requests_are_batched_and_models_on_one_tower_share_its_call(app, folders, tower_calls):
    async def scenario():
        async with serving(app(wait=0.5, batch_size=16)) as client:
            tower_calls.clear()
            return await together(
                *(
                    client.post(CLASSIFY, files=files(image), data={"model": name, "top": "99"})
                    for image in folders.images[:8]
                    for name in ("pets", "more")
                )
            )

    answers = asyncio.run(scenario())
    assert tower_calls == [8]  # sixteen requests, of which two each were about the same image
    expected = [
        table
        for pair in zip(local(folders.pets, folders.images[:8]), local(folders.more, folders.images[:8]), strict=True)
        for table in pair
    ]
    for answer, table in zip(answers, expected, strict=True):
        assert probabilities(answer.json()["results"][0]) == pytest.approx(table, abs=1e-5)


@pytest.mark.parametrize("key", ["clip-lora", "vpt", "falip"])
def test_models_with_another_way_to_see_are_served_as_they_predict(key, tmp_path, folders):
    backbone, data = clipadapt.load_backbone(tiny_clip()), colours(4, seed=1)
    method = quick(key).fit(backbone, data)
    method.save(tmp_path / key)

    models = Models([tmp_path / key, folders.pets])
    served = models.get(key)
    assert (served.tower is None) == (key == "falip")
    assert served.tower != models.get("pets").tower

    async def scenario():
        from clipadapt.serve.app import create_app

        async with serving(create_app(models)) as client:
            return await client.post(CLASSIFY, files=files(*folders.images[:4]), data={"top": "99"})

    results = asyncio.run(scenario()).json()["results"]
    for result, table in zip(results, local(tmp_path / key, folders.images[:4]), strict=True):
        assert probabilities(result) == pytest.approx(table, abs=1e-4)


def test_embeddings_of_texts_and_images_in_openais_form(ask, folders):
    model = clipadapt.load(folders.pets)
    image = "data:image/png;base64," + base64.b64encode(folders.images[3]).decode()
    body = {"input": ["a cat", {"image": image}, "a red house"], "model": "pets"}
    answer = ask("POST", "/v1/embeddings", json=body).json()
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    vectors = torch.tensor([entry["embedding"] for entry in answer["data"]])
    assert torch.allclose(vectors[[0, 2]], model.encode_texts(["a cat", "a red house"]), atol=1e-6)
    pixels = model.backbone_.preprocess(Image.open(BytesIO(folders.images[3])))[None]
    assert torch.allclose(vectors[1], model.encoder.encode(pixels)[0], atol=1e-6)
    assert answer["usage"]["prompt_tokens"] == 4 + 5  # start and end count

    packed = ask("POST", "/v1/embeddings", json={"input": "a cat", "encoding_format": "base64"}).json()
    vector = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    assert np.allclose(vector, vectors[0], atol=1e-6)


def test_searches_by_text_and_by_image_are_the_indexs_own(ask, folders):
    index = Index.open(folders.photos)
    body = {"texts": ["a red house"], "minus": ["a cat"], "top": 3, "where": "year > 2004"}
    hits = ask("POST", "/v1/search", json=body).json()["hits"]
    vector = query_vector(index.model, ["a red house"], minus=["a cat"])
    (expected,) = index.search(vector[None], 3, "year > 2004")
    assert [hit["id"] for hit in hits] == [hit.id for hit in expected]
    assert [hit["score"] for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-5)
    assert all(hit["facts"]["year"] > 2004 for hit in hits)

    (hit,) = ask("POST", "/v1/search", files=files(folders.images[7]), data={"top": "1"}).json()["hits"]
    assert hit["id"] == 7
    assert hit["score"] == pytest.approx(1, abs=1e-3)


def test_a_thumbnail_is_a_small_jpeg_of_its_row(ask, folders, app, tmp_path):
    answer = ask("GET", "/v1/indexes/photos/images/5")
    image = Image.open(BytesIO(answer.content))
    assert (answer.headers["content-type"], image.format, image.size) == ("image/jpeg", "JPEG", (32, 32))
    expected = np.asarray(Image.open(BytesIO(folders.images[5])).convert("RGB"), dtype=float).mean((0, 1))
    assert np.abs(np.asarray(image, dtype=float).mean((0, 1)) - expected).max() < 5
    assert ask("GET", "/v1/indexes/photos/pictures/5").content == answer.content, "the old path"
    assert ask("GET", "/v1/indexes/photos/images/16").status_code == 404
    assert ask("GET", "/v1/indexes/photos/images/-1").status_code == 404


def test_a_heat_map_says_where_and_the_score_is_the_cosine(ask, folders):
    backbone = clipadapt.load_backbone(tiny_clip())
    pixels = backbone.preprocess(Image.open(BytesIO(folders.images[0])))[None]
    with torch.no_grad():
        cosine = backbone.encode_images(pixels)[0] @ backbone.encode_texts(["a star"])[0]
    answer = ask("POST", "/v1/explain", files=files(folders.images[0]), data={"text": "a star"}).json()
    assert answer["grid"] == [4, 4]
    assert answer["box"] == [0, 0, 1, 1]
    assert [len(row) for row in answer["scores"]] == [4] * 4
    assert answer["score"] == pytest.approx(float(cosine), abs=1e-5)
    of_class = ask("POST", "/v1/explain", files=files(folders.images[0]), data={"class": "red"})
    assert of_class.status_code == 200
    assert ask("POST", "/v1/explain", files=files(folders.images[0])).status_code == 400


def test_heat_maps_of_the_embedded_model_are_hot_where_the_thing_is():
    models = Models()
    task, served = Explain(models.get(None)), models.get(None)
    left, right = (8, 50, 40, 82), (56, 10, 88, 42)  # (x, y, x, y) of 96; patches are 16 wide there
    hits = []
    for first, second in itertools.permutations(["red", "blue", "green", "yellow"], 2):
        image = Image.new("RGB", (96, 96), (245, 245, 240))
        ImageDraw.Draw(image).ellipse(left, fill=first)
        ImageDraw.Draw(image).rectangle(right, fill=second)
        pixels, _ = served.on_backbone(EncodedImage("drawn", png(image)), 10_000)
        whys = [Why(pixels, f"a photo of a {first} circle", False), Why(pixels, f"a photo of a {second} square", False)]
        for (scores, _), box in zip(task(whys), (left, right), strict=True):
            row, column = divmod(int(scores.argmax()), scores.shape[1])
            x, y = 16 * column + 8, 16 * row + 8
            hits.append(box[0] <= x <= box[2] and box[1] <= y <= box[3])
    assert sum(hits) / len(hits) > 0.6  # the things cover 4 patches of 36 each


def test_without_a_model_the_backbone_embeds_and_searches(folders):
    models = Models(backbone=str(tiny_clip()))

    async def scenario():
        from clipadapt.serve.app import create_app
        from clipadapt.serve.indexes import Indexes

        async with serving(create_app(models, Indexes([folders.photos], models))) as client:
            return await together(
                client.post("/v1/embeddings", json={"input": "a cat"}),
                client.post("/v1/search", json={"texts": ["a cat"]}),
                client.post(CLASSIFY, files=files(folders.images[0])),
                client.get("/v1/models"),
            )

    embedded, found, classified, listed = asyncio.run(scenario())
    assert (embedded.status_code, found.status_code, classified.status_code) == (200, 200, 400)
    assert len(found.json()["hits"]) == 16
    assert [(m["method"], m["classes"]) for m in listed.json()["data"]] == [(None, [])]


def test_what_does_not_exist_is_404_and_names_what_is_near(ask, folders):
    answer = ask("POST", CLASSIFY, files=files(folders.images[0]), data={"model": "pet"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "Unknown model 'pet'; did you mean 'pets'?")
    assert ask("POST", "/v1/search", json={"texts": ["x"], "index": "fotos"}).status_code == 404
    assert ask("GET", "/v2").json()["error"] == {"message": "There is no such route.", "type": "not_found"}
    assert ask("GET", CLASSIFY).status_code == 405


def test_back_pressure_and_deadlines_reach_the_client(app, folders, monkeypatch):
    import time

    from clipadapt.backbones import Backbone

    encode = Backbone.encode_images
    monkeypatch.setattr(Backbone, "encode_images", lambda self, x, **o: (time.sleep(0.2), encode(self, x, **o))[1])

    async def scenario(**settings):
        async with serving(app(max_images=4, max_texts=4, **settings)) as client:
            return await together(*(client.post(CLASSIFY, files=files(p, p, p, p)) for p in folders.images[:6]))

    answers = asyncio.run(scenario(queue=8, wait=0.0))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503, 503, 503]
    busy = next(answer for answer in answers if answer.status_code == 503)
    assert int(busy.headers["retry-after"]) >= 1
    assert busy.json()["error"]["type"] == "overloaded"
    late = asyncio.run(scenario(queue=256, deadline=0.1, batch_size=4))
    assert {answer.status_code for answer in late} == {504}


def test_metrics_count_requests_batches_and_images(app, folders):
    async def scenario():
        async with serving(app()) as client:
            await client.post(CLASSIFY, files=files(*folders.images[:3]))
            await client.get("/v1/indexes/no/images/1")
            return (await client.get("/metrics")).text

    lines = asyncio.run(scenario()).splitlines()
    assert 'clipadapt_requests_total{route="/v1/classify",status="200"} 1' in lines
    assert 'clipadapt_requests_total{route="/v1/indexes/{index}/images/{row}",status="404"} 1' in lines
    assert "clipadapt_images_total 3" in lines
    assert 'clipadapt_batch_items_bucket{task="Classify",le="4"} 1' in lines
    assert 'clipadapt_batch_items_bucket{task="Classify",le="2"} 0' in lines
    assert 'clipadapt_batch_items_sum{task="Classify"} 3.000000' in lines
    assert "clipadapt_queue_items 0" in lines


# -- models that change while they are asked --------------------------------------------------------------------------


def fitted(names, folder):
    clipadapt.create("zero-shot").fit(clipadapt.load_backbone(tiny_clip()), class_names=names).save(folder)


@pytest.fixture
def changing(tmp_path, monkeypatch):
    """A served model, in a folder of its own, looked at every 20 ms."""
    fitted(["cat", "dog"], tmp_path / "pets")
    models = Models([tmp_path / "pets"])
    watch = models.watch
    monkeypatch.setattr(models, "watch", lambda run, reloaded: watch(run, reloaded, every=0.02))
    return tmp_path / "pets", models


async def until(condition):
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.01)


def test_a_model_is_replaced_under_load_and_each_answer_is_of_one_revision(app, changing, folders):
    folder, models = changing
    known = {}

    async def scenario():
        async with serving(app(index=False, models=models)) as client:
            answers, stop = [], asyncio.Event()

            async def load():
                while not stop.is_set():
                    answers.append(await client.post(CLASSIFY, files=files(*folders.images[:3])))

            clients = [asyncio.create_task(load()) for _ in range(4)]
            for names in (["cat", "dog"], ["red", "blue", "green"], ["star", "house"]):
                await asyncio.to_thread(fitted, names, folder)

                async def seen(names=names):
                    return models.get("pets").class_names == names

                await until(seen)
                known[models.get("pets").revision] = set(names)
                seen_before = len(answers)
                await until(lambda seen_before=seen_before: _true(len(answers) > seen_before + 8))
            stop.set()
            await asyncio.gather(*clients)
            return answers, (await client.get("/metrics")).text

    async def _true(value):
        return value

    answers, metrics = asyncio.run(scenario())
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["revision"] for answer in answers} == set(known)
    for answer in answers:
        for result in answer.json()["results"]:
            assert set(probabilities(result)) == known[answer.json()["revision"]]
    assert 'clipadapt_reloads_total{result="ok"} 2' in metrics


@pytest.mark.parametrize("damage", ["cut", "weights", "gone", "newer"])
def test_a_damaged_new_model_leaves_the_old_one_and_says_so_once(app, changing, folders, caplog, damage):
    folder, models = changing
    before = models.get("pets").revision

    def harm():
        config = json.loads((folder / "config.json").read_text())
        if damage == "cut":
            (folder / "config.json").write_text(json.dumps(config)[:100])
        elif damage == "weights":
            config["weights"]["sha256"] = "0" * 64
            (folder / "config.json").write_text(json.dumps(config))
        elif damage == "gone":
            shutil.rmtree(folder)
        else:
            (folder / "config.json").write_text(json.dumps(config | {"format": 99}))

    async def scenario():
        async with serving(app(index=False, models=models)) as client:
            harm()

            async def failed():
                return 'clipadapt_reloads_total{result="failed"} 1' in (await client.get("/metrics")).text

            await until(failed)
            await asyncio.sleep(0.1)
            answer = await client.post(CLASSIFY, files=files(folders.images[0]))
            complaints = [record.message for record in caplog.records if "cannot be loaded" in record.message]
            await asyncio.to_thread(shutil.rmtree, folder, True)
            await asyncio.to_thread(fitted, ["sun", "moon"], folder)

            async def mended():
                return models.get("pets").class_names == ["sun", "moon"]

            await until(mended)
            return answer, complaints

    with caplog.at_level("INFO", logger="clipadapt.serve"):
        answer, complaints = asyncio.run(scenario())
    assert answer.json()["revision"] == before
    assert len(complaints) == 1
    assert complaints[0].startswith("pets changed but cannot be loaded, so the previous version stays:")


def test_two_models_of_one_name_are_refused(folders, tmp_path):
    shutil.copytree(folders.more, tmp_path / "pets")
    with pytest.raises(clipadapt.errors.ClipadaptError, match="Two models are called 'pets'"):
        Models([folders.pets, tmp_path / "pets"])


def test_an_ensemble_of_requests_uses_few_batches(app, folders, tower_calls):
    async def scenario():
        async with serving(app(wait=0.05)) as client:
            tower_calls.clear()
            images = [png(item.open()) for item in colours(16, seed=5).items]
            return await together(*(client.post(CLASSIFY, files=files(image)) for image in images))

    assert {answer.status_code for answer in asyncio.run(scenario())} == {200}
    assert sum(tower_calls) == 64
    assert len(tower_calls) <= 8
