"""The routes of the HTTP interface: each reads a request, asks the batchers, and writes the answer.

    POST /v1/classify, /v1/embeddings, /v1/search, /v1/explain      GET /v1/models, /healthz, /metrics, /openapi.json
    GET /v1/indexes/{id}/images/{row}, a thumbnail                GET /, the page

No route reads a path or an address from a request.
"""

from __future__ import annotations

import asyncio
import logging
import mimetypes
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRouter
from joblib import cpu_count
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from clipadapt.data import BytesItem
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.search.where import Where
from clipadapt.serve import schemas
from clipadapt.serve.batcher import Batcher, Task
from clipadapt.serve.indexes import Indexes, Search, SearchedIndex
from clipadapt.serve.limits import Settings, check_image, from_data_uri
from clipadapt.serve.log import log
from clipadapt.serve.metrics import Metrics
from clipadapt.serve.models import (
    Classify,
    ClassifyWhole,
    EmbedImages,
    EmbedTexts,
    EncodedImage,
    Explain,
    Models,
    Query,
    QueryVector,
    Served,
    Why,
    as_base64,
)

Form = TypeVar("Form", bound=BaseModel)

_PAGE = Path(__file__).with_name("page")


class Service:
    """What the routes share: models, indexes, and the two batchers, one for the models' thread, one for searches'."""

    def __init__(self, models: Models, indexes: Indexes, settings: Settings) -> None:
        self.models, self.indexes, self.settings = models, indexes, settings
        self.metrics = Metrics()
        self.page = {file.name: file.read_bytes() for file in sorted(_PAGE.glob("*.*"))}

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        settings = self.settings

        def batcher(size: int) -> Batcher:
            return Batcher(
                size=size, wait=settings.wait, limit=settings.queue, deadline=settings.deadline,
                threads=cpu_count(), observe=self._observe,
            )  # fmt: skip

        async with batcher(settings.batch_size) as self.batcher, batcher(settings.batch_size) as self.searcher:
            watch = asyncio.create_task(
                self.models.watch(
                    self.batcher.in_model_thread,
                    lambda result: self.metrics.count("clipadapt_reloads_total", result=result),
                )
            )
            yield
            watch.cancel()

    def _observe(self, task: Task, items: int) -> None:
        self.metrics.observe("clipadapt_batch_items", items, task=type(task).__name__)

    def model(self, name: str | None) -> Served:
        return _get_or_404(self.models.get, name)

    def index(self, name: str | None) -> SearchedIndex:
        return _get_or_404(self.indexes.get, name)

    def check_texts(self, texts: Sequence[str]) -> None:
        """Refuse too many, or too long ones."""
        if len(texts) > self.settings.max_texts:
            raise HTTPException(413, f"A request takes at most {self.settings.max_texts} texts, not {len(texts)}.")
        if any(len(text) > self.settings.max_text for text in texts):
            raise HTTPException(413, f"A text has at most {self.settings.max_text:,} characters.")

    def images(self, files: Sequence[bytes]) -> list[EncodedImage]:
        """The images of a form, not yet opened; they are named by their numbers, not by what clients call them."""
        self._count_images(len(files))
        names = ["The image"] if len(files) == 1 else [f"Image {number + 1}" for number in range(len(files))]
        return [EncodedImage(name, data) for name, data in zip(names, files, strict=True)]

    def _count_images(self, number: int) -> None:
        if number > self.settings.max_images:
            raise HTTPException(413, f"A request takes at most {self.settings.max_images} images, not {number}.")
        self.metrics.count("clipadapt_images_total", number)
        self.metrics.count("clipadapt_pictures_total", number)

    async def embed_texts(self, served: Served, texts: Sequence[str]) -> list[Any]:
        return _or_raise(await self.batcher.ask(EmbedTexts(served), texts))

    async def embed_images(self, served: Served, images: Sequence[EncodedImage]) -> list[Any]:
        self._count_images(len(images))
        prepare = partial(served.prepare, max_pixels=self.settings.max_pixels)
        return _or_raise(await self.batcher.ask(EmbedImages(served), images, prepare))


async def _service(request: Request) -> Service:  # async, as FastAPI sends other functions through a thread
    return request.app.state.service


Shared = Annotated[Service, Depends(_service)]
router = APIRouter()


def _form(form: type[BaseModel], json: type[BaseModel] | None = None) -> dict[str, Any]:
    """What OpenAPI says of a route that reads its body itself."""
    content = {"multipart/form-data": {"schema": form.model_json_schema()}}
    if json is not None:
        content["application/json"] = {"schema": json.model_json_schema()}
    return {"requestBody": {"required": True, "content": content}}


@router.post("/v1/classify", openapi_extra=_form(schemas.ClassifyForm), response_model=schemas.ClassifyAnswer)
async def classify(request: Request, service: Shared) -> Any:
    """The most probable classes of each image; for a multi-label model, the classes present.

    An image that cannot be read has an error in its place; if none of them can, the request fails.
    """
    form = await _read_form(request, schemas.ClassifyForm)
    served = service.model(form.model)
    if not served.class_names:
        raise HTTPException(400, f"{served.id} is a backbone without classes; use an adapted model.")
    images = service.images(form.image)
    task: Task = ClassifyWhole(served) if served.tower is None else Classify(served.tower)

    def prepare(image: EncodedImage) -> Any:
        return served.prepare(image, service.settings.max_pixels), served

    answers = await service.batcher.ask(task, images, prepare)
    results = [_predictions(served, answer, form.top) for answer in answers]
    if all("error" in result for result in results):
        raise DataError(results[0]["error"])
    return {"model": served.id, "revision": served.revision, "results": results}


def _predictions(served: Served, answer: Any, top: int) -> dict[str, Any]:
    """Probabilities (C,) as a list of classes, or why there are none."""
    if isinstance(answer, Exception):
        return {"error": _reason(answer)}
    best, labels = answer.topk(min(top, len(answer)))
    several = getattr(served.model, "multi_label_", False)
    return {
        "predictions": [
            {"class": served.class_names[label], "probability": probability}
            for label, probability in zip(labels.tolist(), best.tolist(), strict=True)
            if not several or probability >= 0.5
        ]
    }


@router.post("/v1/embeddings", response_model=schemas.EmbeddingsAnswer)
async def embeddings(body: schemas.EmbeddingsRequest, service: Shared) -> Any:
    """Unit vectors of texts, and of images as data URIs, in one space; in the form of OpenAI's interface."""
    inputs = [body.input] if isinstance(body.input, str) else body.input
    served = service.model(body.model)
    texts = {place: value for place, value in enumerate(inputs) if isinstance(value, str)}
    service.check_texts(list(texts.values()))
    images = {
        place: EncodedImage(f"The image input[{place}]", from_data_uri(value.image, f"The image input[{place}]"))
        for place, value in enumerate(inputs)
        if not isinstance(value, str)
    }
    found, tokens = {}, 0
    if texts:
        for place, (feature, length) in zip(texts, await service.embed_texts(served, [*texts.values()]), strict=True):
            found[place] = feature
            tokens += length
    if images:
        found |= zip(images, await service.embed_images(served, [*images.values()]), strict=True)
    encode = as_base64 if body.encoding_format == "base64" else lambda feature: feature.tolist()
    data = [{"object": "embedding", "index": place, "embedding": encode(found[place])} for place in sorted(found)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": served.id, "usage": usage})


@router.post(
    "/v1/search",
    openapi_extra=_form(schemas.SearchForm, schemas.SearchRequest),
    response_model=schemas.SearchAnswer,
)
async def search(request: Request, service: Shared) -> Any:
    """The images of an index that are nearest to texts and images, and far from `minus`, best first."""
    query: Any
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data":
        query = await _read_form(request, schemas.SearchForm)
        images = service.images(query.image)
    else:
        query = _validate(schemas.SearchRequest, await request.body())
        images = []
    service.check_texts([*query.texts, *query.minus])
    searched = service.index(query.index)
    served = searched.served if query.model is None else service.model(query.model)
    if served.image_fingerprint != searched.index.embeddings.image_fingerprint:
        reason = f"{served.id} encodes images differently from the model used to embed {searched.id}: embed it again."
        raise HTTPException(400, reason)
    if query.where is not None:
        service.check_texts([query.where])
        Where.parse(query.where).check(searched.index.embeddings.table.schema)
    for image in images:
        check_image(image.data, image.name, service.settings.max_pixels)
    items = tuple(BytesItem(image.name, image.data) for image in images)
    asked = Query(tuple(query.texts), items, tuple(query.minus))
    vectors = _or_raise(await service.batcher.ask(QueryVector(served), [asked]))
    (hits,) = _or_raise(await service.searcher.ask(Search(searched, query.top, query.where), vectors))
    return {"hits": [{"id": h.id, "score": h.score, "name": h.name, "facts": h.facts} for h in hits]}


@router.get("/v1/indexes/{index}/pictures/{row}", include_in_schema=False)  # its old path
@router.get(
    "/v1/indexes/{index}/images/{row}",
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}}},
)
async def thumbnail(index: str, row: int, service: Shared) -> Response:
    """An image of an index, its longest side 256 pixels. Which file that is, the index says."""
    searched = service.index(index)
    if not 0 <= row < len(searched.index):
        raise HTTPException(404, f"{searched.id} has images 0 to {len(searched.index) - 1}, not {row}.")
    try:
        data = await service.batcher.in_helper_thread(partial(searched.thumbnail, row, service.settings.max_pixels))
    except DataError:
        raise HTTPException(404, f"The image of row {row} has been moved or deleted since it was embedded.") from None
    return Response(data, media_type="image/jpeg", headers={"cache-control": "private, max-age=300"})


@router.post("/v1/explain", openapi_extra=_form(schemas.ExplainForm), response_model=schemas.ExplainAnswer)
async def explain(request: Request, service: Shared) -> Any:
    """How well each patch of an image fits a text, or one of the model's classes."""
    form = await _read_form(request, schemas.ExplainForm)
    served = service.model(form.model)
    wanted = form.text if form.class_ is None else form.class_
    if wanted is None or (form.text is not None and form.class_ is not None):
        raise HTTPException(400, "Give either text or class.")
    is_class = form.class_ is not None
    if is_class and wanted not in served.class_names:
        raise HTTPException(404, f"{served.id} has no class of that name.")
    service.check_texts([wanted])
    (image,) = service.images([form.image])

    boxes = []

    def prepare(image: EncodedImage) -> Why:
        pixels, box = served.on_backbone(image, service.settings.max_pixels)
        boxes.append(box)
        return Why(pixels, wanted, is_class)

    ((scores, score),) = _or_raise(await service.batcher.ask(Explain(served), [image], prepare))
    return {"grid": list(scores.shape), "box": boxes[0], "scores": scores.tolist(), "score": score}


@router.get("/v1/models", response_model=schemas.ModelsAnswer)
async def list_models(service: Shared) -> Any:
    """The models and indexes; the first of each is taken where a request names none."""
    return {"data": [s.describe() for s in service.models.served.values()], "indexes": service.indexes.describe()}


@router.get("/healthz", response_model=schemas.HealthAnswer)
async def healthz(request: Request, service: Shared) -> Any:
    """Whether the server takes requests."""
    status = "stopping" if request.app.state.draining else "ok"
    return {"status": status, "models": len(service.models.served)}


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(service: Shared) -> Response:
    """Figures in Prometheus's text format."""
    text = service.metrics.text(
        queue_items=service.batcher.in_hand,
        search_queue_items=service.searcher.in_hand,
        models=len(service.models.served),
    )
    return Response(text, media_type="text/plain; version=0.0.4")


@router.get("/", include_in_schema=False)
async def home(service: Shared) -> Response:
    """The page to try the models."""
    return _static(service, "index.html")


@router.get("/page/{name}", include_in_schema=False)
async def page(name: str, service: Shared) -> Response:
    """A file that the page loads."""
    return _static(service, name)


def _static(service: Service, name: str) -> Response:
    """A file of the page, all of which are in memory."""
    if name not in service.page:
        raise HTTPException(404, "There is no such page.")
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return Response(service.page[name], media_type=kind, headers={"cache-control": "no-cache"})


# -- reading requests -------------------------------------------------------------------------------------------------


async def _read_form(request: Request, form: type[Form]) -> Form:
    """The fields of a multipart form; a list's field may come several times, any other once."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise HTTPException(422, "The body must be a form of the type multipart/form-data.")
    fields: dict[str, Any] = {}
    async with request.form() as data:
        for name in data:
            values: list[Any] = [await v.read() if isinstance(v, UploadFile) else v for v in data.getlist(name)]
            if name != "image" and any(isinstance(value, bytes) for value in values):
                raise HTTPException(422, f"{name[:60]!r} may not be a file.")
            known = form.model_fields.get(name)
            if known is not None and get_origin(known.annotation) is list:
                fields[name] = values
            elif len(values) > 1:
                raise HTTPException(422, f"{name[:60]!r} may be given once.")
            else:
                fields[name] = values[0]
    return _validate(form, fields)


def _validate(form: type[Form], values: dict[str, Any] | bytes) -> Form:
    try:
        return form.model_validate_json(values) if isinstance(values, bytes) else form.model_validate(values)
    except ValidationError as error:
        raise HTTPException(422, sentence(error.errors(include_input=False, include_url=False))) from None


def _get_or_404(get: Any, name: str | None) -> Any:
    try:
        return get(name)
    except ClipadaptError as error:
        raise HTTPException(404, str(error)) from None


def _or_raise(answers: list[Any]) -> list[Any]:
    """The answers, if none of them failed."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


# -- errors -----------------------------------------------------------------------------------------------------------


def _reason(error: Exception) -> str:
    """What a client is told of an image that failed; what is a defect goes to the log."""
    if isinstance(error, ClipadaptError):
        return str(error)
    log.error("An image failed; this is a defect.", exc_info=error)
    return "The model failed on this image; the server's log says how."


def sentence(errors: Sequence[Any]) -> str:
    """The first thing that is wrong with a body, and how many there are."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")[:100] or "The body"
    more = f" ({len(errors)} things are wrong; this is the first.)" if len(errors) > 1 else ""
    return f"{place}: {first['msg'].rstrip('.')}.{more}"


logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every odd form
