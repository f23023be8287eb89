"""/v1/models, /version, and the probes."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import jaxcept
from jaxcept_serve.api import Api
from jaxcept_serve.turns import ServiceError
from jaxcept_serve.wire import Body, json_response


def routes(api: Api) -> list[BaseRoute]:
    """The routes."""
    started = int(time.time())

    def model(name: str) -> Body:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "jaxcept",
            "root": api.service.model_names[0],
            "parent": None,
            "max_model_len": api.service.max_model_len,
        }

    async def list_models(request: Request) -> Response:
        return json_response({"object": "list", "data": [model(name) for name in api.service.model_names]})

    async def show_model(request: Request) -> Response:
        return json_response(model(api.check_model(request.path_params["name"])))

    async def version(request: Request) -> Response:
        return json_response({"version": jaxcept.__version__})

    async def health(request: Request) -> Response:
        if not api.service.is_alive:
            raise ServiceError(503, "the engine has failed")
        return json_response({"status": "alive"})

    async def ready(request: Request) -> Response:
        if not api.service.is_ready or api.gate.is_draining:
            raise ServiceError(503, "no requests are taken", retry_after_s=api.options.retry_after_s)
        return json_response({"status": "ready"})

    return [
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", show_model, methods=["GET"]),
        Route("/version", version, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/ping", health, methods=["GET", "POST"]),
    ]
