"""/tokenize, /detokenize, /tokenizer_info."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from jaxcept.scheduler.params import SamplingParams
from jaxcept_serve.api import MAX_NAME_CHARS, Api
from jaxcept_serve.chat_messages import MESSAGE_SCHEMA, TOOL_SCHEMA, read_messages, read_tools
from jaxcept_serve.client_tools import ToolLimits
from jaxcept_serve.turns import ChatTurn
from jaxcept_serve.wire import Body, Field, as_array, as_token_ids, bad, json_response, read_fields

MAX_IDS = 1 << 22

TOKENIZE_FIELDS = (
    Field("model", "string", max_length=MAX_NAME_CHARS),
    Field("prompt", "string", "A text, to be encoded as it stands."),
    Field("messages", "array", "A conversation, to be encoded as the chat template has it.", min_length=1,
          items=Field("", "object", nullable=False, schema=MESSAGE_SCHEMA)),
    Field("tools", "array", items=Field("", "object", nullable=False, schema=TOOL_SCHEMA)),
    Field("add_special_tokens", "boolean", default=True),
    Field("add_generation_prompt", "boolean", default=True),
    Field("return_token_strs", "boolean", default=False),
)  # fmt: skip
DETOKENIZE_FIELDS = (
    Field("model", "string", max_length=MAX_NAME_CHARS),
    Field("tokens", "any", required=True, schema={"type": "array", "items": {"type": "integer"}},
          read=lambda value, path: as_token_ids(as_array(value, path, MAX_IDS), path)),
)  # fmt: skip


def routes(api: Api) -> list[BaseRoute]:
    """The routes."""

    async def tokenize(request: Request) -> Response:
        values = read_fields(await api.read_body(request), TOKENIZE_FIELDS)
        api.check_model(values["model"])
        ids = await asyncio.to_thread(_ids, values, api)
        told: Body = {"count": len(ids), "max_model_len": api.service.max_model_len, "tokens": ids}
        told["token_strs"] = [api.service.detokenize([i]) for i in ids] if values["return_token_strs"] else None
        return json_response(told)

    async def detokenize(request: Request) -> Response:
        values = read_fields(await api.read_body(request), DETOKENIZE_FIELDS)
        api.check_model(values["model"])
        return json_response({"prompt": await asyncio.to_thread(api.service.detokenize, values["tokens"])})

    async def tokenizer_info(request: Request) -> Response:
        return json_response(api.service.tokenizer_info())

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info, methods=["GET"]),
    ]


def _ids(values: Body, api: Api) -> list[int]:
    if (values["prompt"] is None) == (values["messages"] is None):
        raise bad("prompt", "expected either prompt or messages")
    if values["prompt"] is not None:
        return api.service.tokenize(values["prompt"], values["add_special_tokens"])
    limits = ToolLimits(api.options.max_tools, api.options.max_schema_bytes)
    turn = ChatTurn(
        request_id="",
        messages=read_messages(values["messages"], api.options.max_messages),
        params=SamplingParams(),
        tools=read_tools(values["tools"] or [], limits),
        add_generation_prompt=values["add_generation_prompt"],
    )
    return api.service.tokenize_chat(turn)
