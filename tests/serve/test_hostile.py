"""A thousand malformed or hostile requests, drawn from a seed: each is refused, and the server serves on."""

import asyncio
import base64
import json
import random
import string
import struct
import zlib
from io import BytesIO

import pytest
from PIL import Image

from tests.serve.conftest import files, serving

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

ROUTES = ("/v1/classify", "/v1/embeddings", "/v1/search", "/v1/explain")
PATHS = (
    "../../../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://169.254.169.254/latest/meta-data",
    "..\\..\\x", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "....//....//etc/passwd", "\\\\server\\share", "pets/../pets", "con",
    "a\0b",
)  # fmt: skip
ODD = (
    "\ud800",
    "\u202e",
    "\0",
    "💥" * 50,
    "\u0301" * 300,
    "A" * 5000,
    "' OR 1=1 --",
    "{{7*7}}",
    "<script>",
    "",
    "\n",
    "%s%n",
)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(side: int) -> bytes:
    """A few kilobytes that claim to be side x side pixels."""
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(100_000)))
        + chunk(b"IEND", b"")
    )


def encoded(image: bytes, kind: str) -> bytes:
    file = BytesIO()
    Image.open(BytesIO(image)).convert("RGB").save(file, kind)
    return file.getvalue()


class Hostile:
    """Requests (method, path, httpx arguments), each of which deserves a 4xx."""

    def __init__(self, seed: int, images: list[bytes]) -> None:
        self.random = random.Random(seed)
        self.images = [encoded(image, kind) for image in images[:2] for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF")]

    def requests(self, count: int):
        kinds = [getattr(self, name) for name in dir(self) if name.startswith("a_")]
        for number in range(count):
            yield kinds[number % len(kinds)]()

    def a_broken_image(self):
        draw, image = self.random, self.random.choice(self.images)
        broken = draw.choice(
            [
                image[: draw.randrange(1, min(60, len(image)))],
                draw.randbytes(draw.randrange(1, 400)),
                image[:4] + draw.randbytes(60),
                b"",
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
                b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
                b"GIF89a" + bytes(7),
            ]
        )
        route = draw.choice(["/v1/classify", "/v1/search", "/v1/explain"])
        return "POST", route, {"files": files(broken), "data": {"text": "a cat"} if route == "/v1/explain" else {}}

    def a_bomb(self):
        bomb = png_bomb(self.random.choice([8_000, 20_000, 60_000, 2**31 - 1]))
        if self.random.random() < 0.5:
            return "POST", self.random.choice(["/v1/classify", "/v1/search"]), {"files": files(bomb)}
        uri = "data:image/png;base64," + base64.b64encode(bomb).decode()
        return "POST", "/v1/embeddings", {"json": {"input": [{"image": uri}]}}

    def a_wrong_type(self):
        draw = self.random
        wrong = [
            None,
            1,
            -1,
            1e308,
            True,
            [],
            {},
            [[]],
            [None],
            [1],
            {"a": 1},
            [{"image": 1}],
            [{"image": "x", "y": 1}],
            [{}],
        ]
        route, body = draw.choice(
            [
                ("/v1/embeddings", {"input": draw.choice(wrong)}),
                ("/v1/embeddings", {"input": "a", "model": draw.choice([1, [], {}, True])}),
                ("/v1/embeddings", {"input": "a", "encoding_format": draw.choice(["hex", 1, None, []])}),
                ("/v1/search", {"texts": draw.choice([None, 1, "a", {}, [1], [None], [[]]])}),
                ("/v1/search", {"texts": ["a"], "top": draw.choice([0, -1, 10**30, "5", 1.5, None, [], True])}),
                ("/v1/search", {"texts": ["a"], draw.choice(["path", "url", "file", "Texts", "__proto__"]): "x"}),
            ]
        )
        return "POST", route, {"json": body}

    def a_body_of_no_form(self):
        draw = self.random
        body = draw.choice(
            [
                b"", b"{", b"null", b"[]", b'"a"', b"\xff\xfe\x00", b'{"input":"\xff"}', b"[" * 50_000,
                b'{"a":' * 20_000, b'{"input": NaN}', b'{"input": 1e999}', b"9" * 10_000, draw.randbytes(300),
                b"--x\r\n\r\n",
            ]
        )  # fmt: skip
        kind = draw.choice(
            [
                "application/json", "application/json; charset=utf-7", "multipart/form-data", "a", ";",
                "multipart/form-data; boundary=x", "multipart/form-data; boundary=" + "y" * 300, "text/plain",
                "application/x-www-form-urlencoded", "image/png",
            ]
        )  # fmt: skip
        return "POST", draw.choice(ROUTES), {"content": body, "headers": {"Content-Type": kind}}

    def a_form_gone_wrong(self):
        draw, image = self.random, self.random.choice(self.images)
        number = draw.choice(["0", "-1", "x", "1e9", "99999999999999999999", ""])
        return "POST", "/v1/classify", draw.choice(
            [
                {"data": {"image": draw.choice(PATHS)}, "files": [("other", ("x", b"x"))]},
                {"files": [*files(image), ("url", (None, draw.choice(PATHS)))]},
                {"files": [*files(image), ("top", (None, number))]},
                {"files": [*files(image), ("top", (None, "1")), ("top", (None, "2"))]},
                {"files": [*files(image), ("top", ("a.txt", b"5"))]},
                {"files": files(*[image] * 40)},
                {"files": [*files(image), ("model", (None, draw.choice(PATHS)))]},
                {"files": [(f"field{n}", (None, "x")) for n in range(1200)]},
            ]
        )  # fmt: skip

    def a_path_trick(self):
        draw = self.random
        name = draw.choice([path for path in PATHS if "\0" not in path])
        row = draw.choice(["-1", "16", "1e3", "0x1", "9" * 400, "٣٣", "1%00"])
        return draw.choice(
            [
                ("GET", f"/v1/indexes/{name}/images/0", {}),
                ("GET", f"/v1/indexes/photos/images/{name}", {}),
                ("GET", f"/v1/indexes/photos/images/{row}", {}),
                ("GET", f"/page/{name}", {}),
                ("GET", f"/page/%2e%2e/app.py?x={draw.randrange(9)}", {}),
                ("GET", "/" + "a/" * draw.randrange(2, 2000), {}),
                (draw.choice(["PUT", "DELETE", "PATCH", "TRACE", "BREW"]), draw.choice([*ROUTES, "/healthz"]), {}),
                ("POST", "/v1/embeddings", {"json": {"input": [{"image": name}]}}),
                ("POST", "/v1/search", {"json": {"texts": ["a"], "index": name}}),
            ]
        )  # fmt: skip

    def a_huge_header(self):
        draw = self.random
        headers = draw.choice([{"X-A": "a" * draw.randrange(17_000, 60_000)}, {f"X-{n}": "b" * 40 for n in range(500)}])
        return draw.choice([("GET", "/v1/models", {"headers": headers}), ("POST", ROUTES[0], {"headers": headers})])

    def a_wrong_condition(self):
        draw = self.random
        letters = string.printable + "äß\u2028"
        conditions = [
            "", "year", "year >", "year = 'x", "(" * 300 + "year > 1" + ")" * 300, "year > 1; drop table x",
            "nothing = 1", "not " * 3000 + "year = 1", "year in (" + "1," * 50_000 + "1)", '"" = 1', "year like 5",
            "".join(draw.choice(letters) for _ in range(20)) + " ((",
        ]  # fmt: skip
        return "POST", "/v1/search", {"json": {"texts": ["a"], "where": draw.choice(conditions)}}

    def an_odd_text(self):
        draw, odd = self.random, self.random.choice(ODD)
        return "POST", *draw.choice(
            [
                ("/v1/embeddings", {"content": json.dumps({"input": "a", "model": odd or "x"})}),
                ("/v1/embeddings", {"content": json.dumps({"input": ["\ud800 alone"]})}),
                ("/v1/embeddings", {"content": json.dumps({"input": ["a" * 2001]})}),
                ("/v1/embeddings", {"content": json.dumps({"input": ["a"] * 129})}),
                ("/v1/search", {"content": json.dumps({"texts": ["a"], "index": odd or "x"})}),
                ("/v1/search", {"content": json.dumps({"texts": [draw.choice(["", " ", "\n"])]})}),
                ("/v1/search", {"content": json.dumps({"texts": ["a"], odd or "x": 1})}),
            ]
        )  # fmt: skip


def json_typed(arguments):
    if "content" in arguments and "headers" not in arguments:
        return arguments | {"headers": {"Content-Type": "application/json"}}
    return arguments


def test_a_thousand_hostile_requests_are_refused_and_the_server_serves_on(app, folders):
    requests = list(Hostile(seed=6, images=folders.images).requests(1000))

    async def scenario():
        async with serving(app()) as client:
            before = (await client.post("/v1/classify", files=files(folders.images[0]))).json()
            answers = []
            for start in range(0, len(requests), 20):
                some = [client.request(m, path, **json_typed(a)) for m, path, a in requests[start : start + 20]]
                answers += await asyncio.gather(*some)
            after = (await client.post("/v1/classify", files=files(folders.images[0]))).json()
            return before, answers, after

    before, answers, after = asyncio.run(scenario())
    wrong = [
        (request[0], request[1][:80], str(request[2])[:200], answer.status_code, answer.text[:200])
        for request, answer in zip(requests, answers, strict=True)
        if not 400 <= answer.status_code < 500 or set(answer.json()["error"]) != {"message", "type"}
    ]
    assert not wrong, (len(wrong), wrong[:5])
    assert not [
        answer.text for answer in answers if "root:" in answer.text or str(folders.photos.parent) in answer.text
    ]
    assert before == after
