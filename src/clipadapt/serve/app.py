"""The HTTP server as an ASGI application: its routes, its gate, and what it answers where something is wrong."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException

import clipadapt
from clipadapt.errors import ClipadaptError
from clipadapt.serve import schemas
from clipadapt.serve.batcher import Full, Late
from clipadapt.serve.gate import Gate, error_answer
from clipadapt.serve.indexes import Indexes
from clipadapt.serve.limits import Settings
from clipadapt.serve.models import Models
from clipadapt.serve.routes import Service, router, sentence

_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorAnswer, "description": text}
    for status, text in {
        400: "Well-formed, but cannot be done",
        401: "An API key is needed",
        404: "Not found",
        405: "Method not allowed",
        408: "The body did not arrive in time",
        413: "Too many bytes, images or texts",
        422: "Not well-formed",
        431: "The headers are too large",
        503: "Busy; Retry-After says how long to wait",
        504: "Not answered in time",
    }.items()
}


def create_app(models: Models, indexes: Indexes | None = None, settings: Settings | None = None) -> FastAPI:
    """The server as an ASGI application; its batchers run from its lifespan's start to its end."""
    settings = settings or Settings()
    service = Service(models, indexes or Indexes([], models), settings)
    app = FastAPI(
        title="clipadapt",
        summary="Classify, embed, search and explain images with adapted CLIP-like models.",
        version=clipadapt.__version__,
        lifespan=service.running,
        docs_url=None,  # its page loads scripts from another host
        redoc_url=None,
        responses=_FAILURES,
    )
    app.state.service, app.state.draining = service, False
    app.include_router(router)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _not_of_the_form)
    app.add_exception_handler(ClipadaptError, lambda request, error: error_answer(400, str(error)))
    app.add_exception_handler(Full, _busy)
    app.add_exception_handler(Late, lambda request, error: error_answer(504, str(error)))
    app.add_middleware(Gate, settings=settings, metrics=service.metrics)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )
    if settings.keys:
        _say_that_keys_are_needed(app)
    return app


async def _not_of_the_form(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_answer(422, sentence(error.errors()))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "There is no such route.", 405: "Method not allowed."}.get(error.status_code)
    said = str(error.detail)
    plain = said in ("Not Found", "Method Not Allowed")
    return error_answer(error.status_code, message if plain and message else said, dict(error.headers or {}))


async def _busy(request: Request, error: Exception) -> Response:
    assert isinstance(error, Full)
    return error_answer(503, str(error), {"retry-after": str(error.retry_after)})


def _say_that_keys_are_needed(app: FastAPI) -> None:
    """Add to the OpenAPI document what the gate does."""
    document = app.openapi()
    document.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    document["paths"]["/healthz"]["get"]["security"] = []
