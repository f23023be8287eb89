"""/openapi.json: the document of every route, made from the tables of fields by which bodies are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import jaxcept
from jaxcept_serve import chat, completions, generate, messages, response_request, tokens
from jaxcept_serve.api import Api
from jaxcept_serve.security import OPEN_PATHS
from jaxcept_serve.wire import Body, Field, is_anthropic, json_response

JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_REFUSALS = {
    "400": "A value is wrong; the error names the field.", "401": "The API key is missing or wrong.",
    "403": "The Host header is not a name of this server.", "404": "There is none.", "405": "Another method.",
    "408": "The body did not arrive in time.", "409": "It is in another state.", "410": "It has expired.",
    "413": "The body is too large.", "415": "The body is not declared as JSON in UTF-8.",
    "429": "Too many requests of this key; see Retry-After.", "431": "The headers are too large.",
    "500": "The server failed; nothing that a client sends should lead here.",
    "503": "Overloaded, shutting down, or the engine has failed; see Retry-After.",
}  # fmt: skip
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@dataclass(frozen=True, slots=True)
class Operation:
    """What one method of one path does. `fields` None: it takes no body."""

    method: str
    path: str
    about: str
    tag: str
    fields: Sequence[Field] | None = None
    answers: Sequence[str] = (JSON,)


_NATIVE = "/v1/interceptions/{id}"
_RESPONSE = "/v1/responses/{response_id}"
OPERATIONS = (
    Operation("post", "/v1/chat/completions", "The next turn of a conversation.", "OpenAI", chat.CHAT_FIELDS,
              (JSON, EVENTS)),
    Operation("post", "/v1/completions", "Completes prompts.", "OpenAI", completions.COMPLETION_FIELDS, (JSON, EVENTS)),
    Operation("post", "/v1/responses", "The next response of a conversation, which is kept.", "OpenAI",
              response_request.RESPONSE_FIELDS, (JSON, EVENTS)),
    Operation("post", "/v1/responses/input_tokens", "Tokens of a prompt.", "OpenAI", response_request.PROMPT_FIELDS),
    Operation("get", _RESPONSE, "A response that was kept.", "OpenAI", None, (JSON, EVENTS)),
    Operation("delete", _RESPONSE, "Forgets a response.", "OpenAI"),
    Operation("post", f"{_RESPONSE}/cancel", "Ends a response in the background.", "OpenAI"),
    Operation("get", f"{_RESPONSE}/input_items", "What a response was asked.", "OpenAI"),
    Operation("get", "/v1/models", "The models.", "OpenAI"),
    Operation("get", "/v1/models/{name}", "One model.", "OpenAI"),
    Operation("post", "/v1/messages", "The next turn of a conversation.", "Anthropic", messages.MESSAGE_FIELDS,
              (JSON, EVENTS)),
    Operation("post", "/v1/messages/count_tokens", "Tokens of a prompt.", "Anthropic", messages.PROMPT_FIELDS),
    Operation("post", "/v1/generate", "Completes a prompt, with interceptions that the client answers.", "jaxcept",
              generate.GENERATE_FIELDS, (JSON, EVENTS)),
    Operation("get", _NATIVE, "An interception.", "jaxcept"),
    Operation("delete", _NATIVE, "Ends an intercepted generation.", "jaxcept"),
    Operation("post", f"{_NATIVE}/resume", "Answers an interception, at once or in pieces.", "jaxcept",
              generate.RESUME_FIELDS, (JSON, EVENTS)),
    Operation("post", "/tokenize", "Token ids of a text or a conversation.", "tokens", tokens.TOKENIZE_FIELDS),
    Operation("post", "/detokenize", "The text of token ids.", "tokens", tokens.DETOKENIZE_FIELDS),
    Operation("get", "/tokenizer_info", "The tokenizer.", "tokens"),
    Operation("get", "/health", "200 while the engine lives.", "probes"),
    Operation("get", "/ready", "200 while requests are taken.", "probes"),
    Operation("get", "/ping", "The same as /health.", "probes"),
    Operation("post", "/ping", "The same as /health.", "probes"),
    Operation("get", "/version", "The server's version.", "probes"),
    Operation("get", "/metrics", "Figures for Prometheus.", "probes", None, (TEXT,)),
)  # fmt: skip


def routes(api: Api) -> list[BaseRoute]:
    """GET /openapi.json."""

    async def document(request: Request) -> Response:
        has_keys = bool(api.options.api_keys)
        return json_response(make_document(_served(request.app.routes), api.service.model_names, has_keys))

    return [Route("/openapi.json", document, methods=["GET"])]


def make_document(operations: Iterable[Operation], model_names: Sequence[str], has_keys: bool) -> Body:
    """The document of these operations on these models, by OpenAPI 3.1."""
    paths: dict[str, Body] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _describe(operation, model_names, has_keys)
    document: Body = {
        "openapi": "3.1.0",
        "info": {
            "title": "jaxcept",
            "version": jaxcept.__version__,
            "description": "LLM inference for generations that stop to use tools.",
        },
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }
    if has_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def body_schema(fields: Iterable[Field], model_names: Sequence[str] = ()) -> Body:
    """The JSON schema of a body. Fields that it does not name are accepted: clients send more than servers know."""
    fields = list(fields)
    schema: Body = {"type": "object", "properties": {field.name: field.json_schema for field in fields}}
    if model_names and "model" in schema["properties"]:
        named = next(field for field in fields if field.name == "model")
        schema["properties"]["model"]["enum"] = [*model_names, *([] if named.required else [None])]
    required = [field.name for field in fields if field.required]
    return {**schema, "required": required} if required else schema


def _served(routes_of_app: Iterable[BaseRoute]) -> list[Operation]:
    served = {
        (_PARAMETER.sub(r"{\1}", route.path), method.lower())
        for route in routes_of_app
        if isinstance(route, Route)
        for method in route.methods or ()
    }
    return [operation for operation in OPERATIONS if (operation.path, operation.method) in served]


def _describe(operation: Operation, model_names: Sequence[str], has_keys: bool) -> Body:
    error = {"$ref": "#/components/schemas/Error"}
    refusals = {
        status: {"description": about, "content": {JSON: {"schema": {} if is_anthropic(operation.path) else error}}}
        for status, about in _REFUSALS.items()
    }
    answer = {"description": "The answer.", "content": {kind: {"schema": {}} for kind in operation.answers}}
    told: Body = {
        "summary": operation.about,
        "tags": [operation.tag],
        "operationId": re.sub(r"\W+", "_", f"{operation.method}{operation.path}").strip("_"),
        "responses": {"200": answer, **refusals},
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(operation.path)
    ]
    if parameters:
        told["parameters"] = parameters
    if operation.fields is not None:
        told["requestBody"] = {
            "required": True,
            "content": {JSON: {"schema": body_schema(operation.fields, model_names)}},
        }
    if has_keys and operation.path not in OPEN_PATHS:
        told["security"] = [{"key": []}]
    return told
