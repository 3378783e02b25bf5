"""What the server refuses: keys, sizes, counts, pixels; what it adds to every answer and writes to its log."""

import asyncio
import json
import logging
from io import BytesIO

import pytest
from PIL import Image

from clipadapt.errors import ClipadaptError, DataError
from clipadapt.serve.limits import Settings, check_image, from_data_uri, hash_key, is_known, read_keys
from clipadapt.serve.log import JsonLines
from tests.serve.conftest import files, serving

CLASSIFY, KEY = "/v1/classify", "correct-horse-battery"


def message(answer):
    return answer.json()["error"]["message"]


def test_keys_of_file_and_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}   # the phone's\n\n")
    keys = read_keys(file, {"CLIPADAPT_API_KEYS": "sixteen-letters-1, sixteen-letters-2"})
    assert {hash_key(KEY), hash_key("sixteen-letters-1"), hash_key("sixteen-letters-2")} == set(keys)
    assert is_known(KEY, keys)
    assert not is_known(KEY + "x", keys)
    assert not is_known("", keys)
    assert read_keys(None, {}) == ()
    file.write_text("short\n")
    with pytest.raises(ClipadaptError, match="at least 16 characters"):
        read_keys(file, {})
    file.write_text("# none\n")
    with pytest.raises(ClipadaptError, match="is empty; write one key"):
        read_keys(file, {})
    with pytest.raises(ClipadaptError, match="cannot be read"):
        read_keys(tmp_path / "missing", {})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": f"Bearer {KEY}x"}, 401),
        ({"Authorization": KEY}, 401),
        ({"Authorization": f"Basic {KEY}"}, 401),
        ({"Authorization": f"Bearer {KEY}"}, 200),
        ({"Authorization": f"bearer {KEY}"}, 200),
        ({"X-API-Key": KEY}, 200),
    ],
)
def test_a_key_is_asked_for_everywhere_but_at_the_door(ask, headers, status):
    settings = {"keys": (hash_key("another-key-of-someone"), hash_key(KEY))}
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        answer = ask("GET", path, settings=settings, headers=headers)
        assert answer.status_code == status
        assert status == 200 or answer.json()["error"]["type"] == "authentication_error"
    assert ask("GET", "/healthz", settings=settings, headers=headers).status_code == 200
    assert ask("GET", "/page/../v1/models", settings=settings, headers=headers).status_code in (401, 404, 200)
    assert ask("GET", "/page/%2e%2e/v1/models", settings=settings).status_code in (401, 404)


def test_a_body_is_counted_while_it_comes_and_not_read_to_its_end(app):
    sent = []

    async def endless():
        for _ in range(1000):
            sent.append(1)
            yield b"x" * 1000

    async def scenario():
        async with serving(app(max_body=10_000)) as client:
            claimed = await client.post(CLASSIFY, content=b"x" * 10_001)
            chunked = await client.post("/v1/search", content=endless())
            return claimed, chunked

    claimed, chunked = asyncio.run(scenario())
    for answer in (claimed, chunked):
        assert (answer.status_code, answer.json()["error"]["type"]) == (413, "too_large")
        assert message(answer) == "The body has more than 0.01 MB, which is the limit."


def test_a_body_that_does_not_come_is_given_up(app):
    async def stalling():
        yield b"--x\r\n"
        await asyncio.sleep(30)

    async def scenario():
        async with serving(app(deadline=0.2)) as client:
            form = {"Content-Type": "multipart/form-data; boundary=x"}
            return await client.post(CLASSIFY, content=stalling(), headers=form)

    answer = asyncio.run(asyncio.wait_for(scenario(), 20))
    assert (answer.status_code, answer.json()["error"]["type"]) == (408, "timeout")


@pytest.mark.parametrize(
    ("settings", "path", "request_", "status", "sentence"),
    [
        ({"max_images": 2}, CLASSIFY, "three", 413, "A request takes at most 2 images, not 3."),
        ({"max_pixels": 1000}, CLASSIFY, "three", 400, "Image 1 has more than 1,000 pixels; shrink it first."),
        ({"max_texts": 2}, "/v1/embeddings", {"input": ["a"] * 3}, 413, "A request takes at most 2 texts, not 3."),
        ({"max_text": 5}, "/v1/search", {"texts": ["a"], "minus": ["2 dogs"]}, 413, "A text has at most 5 characters."),
        ({}, "/v1/search", {"texts": ["a"], "color": "red"}, 422, "color: Extra inputs are not permitted."),
        ({}, "/v1/search", {"texts": ["a"], "top": 0}, 422, "top: Input should be greater than or equal to 1."),
        ({}, "/v1/search", {"texts": ["a"], "where": "yearr > 1"}, 400, "Unknown column 'yearr'; did you mean 'year'?"),
        ({}, "/v1/search", {"texts": []}, 400, "A query needs a text or an image."),
    ],
)  # fmt: skip
def test_limits_have_their_sentences(ask, folders, settings, path, request_, status, sentence):
    body = {"files": files(*folders.images[:3])} if request_ == "three" else {"json": request_}
    answer = ask("POST", path, settings=settings, **body)
    assert (answer.status_code, message(answer)) == (status, sentence)


def test_headers_are_bounded(ask):
    answer = ask("GET", "/v1/models", headers={"X-Long": "x" * 20_000})
    assert (answer.status_code, answer.json()["error"]["type"]) == (431, "too_large")


def test_requests_in_hand_are_bounded_but_for_the_health_check(app, folders):
    async def scenario():
        application = app(queue=4, max_images=4, max_texts=4)
        async with serving(application) as client:
            hold = asyncio.Event()

            async def held():
                await hold.wait()
                yield b"{}"

            waiting = [asyncio.create_task(client.post("/v1/search", content=held())) for _ in range(4)]
            await asyncio.sleep(0.1)
            answers = [await client.get(path) for path in ("/v1/models", "/healthz", "/metrics")]
            hold.set()
            await asyncio.gather(*waiting)
            return [*answers, await client.get("/v1/models")]

    busy, health, metrics, later = asyncio.run(scenario())
    assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
    assert (health.status_code, metrics.status_code, later.status_code) == (200, 200, 200)


def test_a_queue_shorter_than_a_request_is_refused():
    with pytest.raises(ClipadaptError, match="too short for one request of 32 images"):
        Settings(queue=16)


def test_images_are_judged_by_their_headers():
    def bmp_of(width, height):
        file = BytesIO()
        Image.new("1", (8, 8)).save(file, "BMP")
        data = bytearray(file.getvalue())
        data[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
        return bytes(data)

    check_image(bmp_of(1000, 1000), "It", 1_000_000)
    for side in (1001, 30_000):  # above ours, and above Pillow's own bound
        with pytest.raises(DataError, match="It has more than 1,000,000 pixels; shrink it first"):
            check_image(bmp_of(side, side), "It", 1_000_000)
    with pytest.raises(DataError, match="supported format"):  # Pillow would start Ghostscript
        check_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "It", 100)


@pytest.mark.parametrize(
    "uri",
    ["http://localhost/a.png", "file:///etc/passwd", "/etc/passwd", "data:text/plain;base64,QQ==", "data:image/png,A"],
)
def test_only_data_uris_are_images(uri):
    with pytest.raises(DataError, match="must be given as"):
        from_data_uri(uri, "It")
    assert from_data_uri("data:image/png;base64,QUI=", "It") == b"AB"
    with pytest.raises(DataError, match="not valid base64"):
        from_data_uri("data:image/png;base64,QUI=!", "It")


def test_every_answer_has_an_id_and_security_headers(ask):
    for path in ("/v1/models", "/nowhere"):
        answer = ask("GET", path, headers={"X-Request-ID": "abc-123"})
        assert answer.headers["x-request-id"] == "abc-123"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    made = ask("GET", "/healthz", headers={"X-Request-ID": "a b\tc"}).headers["x-request-id"]
    assert len(made) == 32
    assert made.isalnum()


def test_other_origins_are_let_in_only_when_named(ask):
    asking = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    assert ask("OPTIONS", CLASSIFY, headers=asking).status_code == 405
    assert "access-control-allow-origin" not in ask("GET", "/v1/models", headers=asking).headers
    settings = {"cors": ("https://shop.example",), "keys": (hash_key(KEY),)}
    allowed = ask("OPTIONS", CLASSIFY, headers=asking, settings=settings)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://shop.example")
    other = ask("OPTIONS", CLASSIFY, headers=asking | {"Origin": "https://evil.example"}, settings=settings)
    assert "access-control-allow-origin" not in other.headers


def test_the_log_has_a_json_line_for_each_request_and_no_key(ask, caplog):
    with caplog.at_level(logging.INFO, logger="clipadapt.serve"):
        ask("GET", "/v1/models?secret=1", headers={"Authorization": f"Bearer {KEY}", "X-Request-ID": "abc"})
    lines = [JsonLines().format(record) for record in caplog.records if record.name == "clipadapt.serve"]
    (line,) = map(json.loads, lines)
    assert line["id"] == "abc"
    assert (line["method"], line["path"], line["status"], line["level"]) == ("GET", "/v1/models", 200, "info")
    assert KEY not in lines[0]
    assert "secret" not in lines[0]


def test_a_defect_is_a_500_with_an_id_and_a_traceback_in_the_log(ask, monkeypatch, caplog):
    monkeypatch.setattr("clipadapt.serve.models.Served.describe", lambda self: 1 / 0)
    answer = ask("GET", "/v1/models")
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert answer.headers["x-request-id"] in message(answer)
    assert any(record.exc_info for record in caplog.records if record.name == "clipadapt.serve")
