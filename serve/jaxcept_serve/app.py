"""The HTTP application: the routes of every API behind one wall."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from jaxcept_serve import chat, completions, messages, models, openapi, responses, tokens
from jaxcept_serve.api import Api
from jaxcept_serve.limits import ApiKey, Gate, ServerOptions
from jaxcept_serve.security import Wall
from jaxcept_serve.turns import Service, ServiceError
from jaxcept_serve.wire import shown

RouteMaker = Callable[[Api], Sequence[BaseRoute]]

ROUTE_MAKERS: tuple[RouteMaker, ...] = (
    chat.routes,
    completions.routes,
    responses.routes,
    messages.routes,
    models.routes,
    tokens.routes,
    openapi.routes,
)


def create_app(
    service: Service, options: ServerOptions | None = None, extra_routes: Sequence[RouteMaker] = ()
) -> Starlette:
    """The application. `extra_routes` are functions from Api to routes, as every module of routes has one.

    `app.state.api` is the Api; `app.state.api.gate.is_draining = True` refuses what is yet to come.
    """
    options = options or ServerOptions()
    api = Api(service, options, Gate(options))

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        return api.error(request, error)

    async def not_found(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        texts = {404: f"there is no {shown(request.scope['path'])}", 405: "this path does not know the method"}
        response = api.error(request, ServiceError(error.status_code, texts.get(error.status_code, error.detail)))
        response.headers.update(error.headers or {})
        return response

    middleware = [Middleware(Wall, options=options, gate=api.gate)]
    if options.cors_origins:
        cors = Middleware(CORSMiddleware, allow_origins=options.cors_origins, allow_methods=["*"], allow_headers=["*"])
        middleware.insert(0, cors)
    routes = [route for make in (*ROUTE_MAKERS, *extra_routes) for route in make(api)]
    app = Starlette(
        routes=routes, middleware=middleware, exception_handlers={ServiceError: refuse, HTTPException: not_found}
    )
    app.router.redirect_slashes = False
    app.state.api = api
    return app


__all__ = ["ROUTE_MAKERS", "Api", "ApiKey", "RouteMaker", "ServerOptions", "create_app"]
