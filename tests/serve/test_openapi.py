"""The OpenAPI document is what the server does: schemathesis draws requests from it and judges every answer."""

from __future__ import annotations

import pytest
import schemathesis
from schemathesis import engine
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events

from clipadapt.serve.app import create_app
from clipadapt.serve.indexes import Indexes
from clipadapt.serve.limits import Settings, hash_key

KEY = "correct-horse-battery"

CONFIG = {
    "headers": {"Authorization": f"Bearer {KEY}"},
    "generation": {"max-examples": 40, "deterministic": True},
    # 400: of the right form, and yet it cannot be done: random bytes are no image, random words no condition.
    # 413: too many texts, which a schema could say only if the limit could not be set.
    "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "400", "404", "413"]}},
}


@pytest.fixture(scope="module")
def interface(models, folders):
    app = create_app(models, Indexes([folders.photos], models), Settings(wait=0.0, keys=(hash_key(KEY),)))
    config = SchemathesisConfig.from_dict(CONFIG)
    return schemathesis.openapi.from_asgi(
        "/openapi.json", app, config=config, headers={"Authorization": f"Bearer {KEY}"}
    )


def test_schemathesis_finds_nothing(interface):
    found, requests = [], 0
    for event in engine.from_schema(interface).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            found.append(str(event))
        if isinstance(event, events.ScenarioFinished):
            requests += len(event.recorder.interactions)
            for case, checks in event.recorder.checks.items():
                request = event.recorder.interactions[case].request
                found += [
                    f"{request.method} {request.uri} {request.body!r}: {check.name}: {check.failure_info.failure}"
                    for check in checks
                    if check.failure_info
                ]
    assert not found, "\n\n".join(dict.fromkeys(found))
    assert requests > 500


def test_the_document_names_every_route(interface):
    assert set(interface.raw_schema["paths"]) == {
        "/v1/classify", "/v1/embeddings", "/v1/search", "/v1/explain", "/v1/models", "/healthz", "/metrics",
        "/v1/indexes/{index}/images/{row}",
    }  # fmt: skip
