"""Two models on one tiny tower, an index of the same images, and the server in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

import clipadapt
from clipadapt.backbones import Backbone
from clipadapt.embeddings import encode_shard
from clipadapt.serve.app import create_app
from clipadapt.serve.indexes import Indexes
from clipadapt.serve.limits import Settings
from clipadapt.serve.models import Models
from tests.images import colours
from tests.tiny import tiny_clip


class Served(NamedTuple):
    """Folders of what is served, and images to ask about."""

    pets: Path
    more: Path
    photos: Path
    images: list[bytes]


def png(image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Served:
    root = tmp_path_factory.mktemp("served")
    backbone, data = clipadapt.load_backbone(tiny_clip()), colours(4, seed=1)
    images = [png(item.open()) for item in data.items]
    paths = [root / f"{number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image)
    clipadapt.create("tip-adapter").fit(backbone, data).save(root / "pets")
    clipadapt.create("zero-shot").fit(backbone, class_names=["cat", "dog", "star"]).save(root / "more")
    years = [2000 + number for number in range(len(paths))]
    encode_shard(backbone, list(map(str, paths)), root / "photos", columns={"year": years})
    return Served(root / "pets", root / "more", root / "photos", images)


@pytest.fixture(scope="session")
def models(folders) -> Models:
    return Models([folders.pets, folders.more])


@pytest.fixture
def tower_calls(monkeypatch) -> list[int]:
    """How many images went through an image tower, call by call."""
    calls: list[int] = []
    encode = Backbone.encode_images

    def counted(self, pixels, **options):
        calls.append(len(pixels))
        return encode(self, pixels, **options)

    monkeypatch.setattr(Backbone, "encode_images", counted)
    return calls


@pytest.fixture
def app(models, folders):
    """Make the application; keyword arguments are settings."""

    def make(*, index: bool = True, models: Models = models, **settings: Any):
        return create_app(models, Indexes([folders.photos] if index else [], models), Settings(**settings))

    return make


@asynccontextmanager
async def serving(app) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, in this process."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client,
    ):
        yield client


@pytest.fixture
def ask(app):
    """Send one request to a new server: `ask("POST", "/v1/classify", files=…)`; `settings` are the server's."""

    def send(method: str, path: str, *, settings: dict[str, Any] | None = None, **request: Any) -> httpx.Response:
        async def scenario() -> httpx.Response:
            async with serving(app(**settings or {})) as client:
                return await client.request(method, path, **request)

        return asyncio.run(scenario())

    return send


def files(*images: bytes) -> list[tuple[str, Any]]:
    return [("image", ("image", image)) for image in images]


async def together(*requests: Coroutine[Any, Any, httpx.Response]) -> list[httpx.Response]:
    return list(await asyncio.gather(*requests))
