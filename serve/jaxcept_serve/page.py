"""The page at /: one static file, and the feed that it draws."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from jaxcept_serve.api import Api
from jaxcept_serve.families import Snapshot
from jaxcept_serve.lanes import Frame, Lanes
from jaxcept_serve.sse import event
from jaxcept_serve.turns import ServiceError

FRAME_S = 0.2
MAX_WATCHERS = 32
_FIGURES = (
    "num_running", "num_waiting", "num_intercepted", "generated_tokens", "prefill_tokens", "returned_tokens",
    "recomputed_tokens", "cache_query_tokens", "cache_hit_tokens", "interceptions", "preemptions",
    "swapped_out_blocks", "swapped_in_blocks", "waste_held", "waste_recompute", "busy_s", "held_blocks",
    "held_host_blocks",
)  # fmt: skip


def read_page() -> str:
    """The HTML file."""
    return (files("jaxcept_serve") / "static" / "index.html").read_text(encoding="utf-8")


def content_security_policy(html: str) -> str:
    """Allows the page's own inline script and style, by their hashes, and requests to this server; nothing else."""
    sources = {
        name: " ".join(f"'sha256-{_sha256(text)}'" for text in re.findall(rf"<{name}>(.*?)</{name}>", html, re.DOTALL))
        for name in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def live_routes(lanes: Lanes, snapshot: Callable[[], Snapshot], policy: str = "") -> Callable[[Api], list[BaseRoute]]:
    """GET / and GET /live, given who watches the engine."""
    html = read_page()
    headers = {
        "content-security-policy": content_security_policy(html),
        "cache-control": "no-cache",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
    }

    def routes(api: Api) -> list[BaseRoute]:
        watchers = 0

        async def page(request: Request) -> Response:
            return Response(html, media_type="text/html", headers=headers)

        async def frames() -> AsyncIterator[bytes]:
            nonlocal watchers
            watchers += 1
            serial = 0
            try:
                yield event({"model": api.service.model_names[0], "policy": policy})
                while not api.gate.is_draining:
                    frame = lanes.frame(serial)
                    serial = frame.serial
                    yield event(frame_json(frame, snapshot()))
                    await asyncio.sleep(FRAME_S)
            finally:
                watchers -= 1

        async def live(request: Request) -> Response:
            if watchers >= MAX_WATCHERS:
                raise ServiceError(503, f"{MAX_WATCHERS} pages watch this server already", retry_after_s=10)
            return api.stream(request, frames())

        return [Route("/", page, methods=["GET"]), Route("/live", live, methods=["GET"])]

    return routes


def frame_json(frame: Frame, snapshot: Snapshot) -> dict[str, Any]:
    """A frame as the page reads it: moves and rows as arrays, figures by name."""
    return {
        "now": round(frame.now, 4),
        "at": round(snapshot.at, 4),
        "moves": [[move.lane, round(move.at, 4), move.state.value, move.label] for move in frame.moves],
        "rows": [
            [
                row.lane,
                row.state.value,
                round(row.since, 4),
                row.label,
                row.num_tokens,
                row.device,
                row.host,
                row.dropped,
            ]
            for row in frame.rows
        ],
        "figures": {name: snapshot.figure(name) for name in _FIGURES},
        "memory": {
            "blocks": snapshot.num_blocks,
            "cached": snapshot.num_cached_blocks,
            "host_blocks": snapshot.num_host_blocks,
            "host_cached": snapshot.num_cached_host_blocks,
            "block_bytes": snapshot.block_bytes,
            "device": snapshot.residence.device,
            "host": snapshot.residence.host,
            "dropped": snapshot.residence.dropped,
        },
        "is_dead": snapshot.is_dead,
    }
