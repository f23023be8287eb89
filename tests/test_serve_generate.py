"""The engine's own API over HTTP: triggers, answers by id, pieces, and everything that an answer cannot be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from jaxcept import AsyncLLM
from jaxcept_serve.app import ApiKey, ServerOptions, create_app
from jaxcept_serve.generate import routes_of
from jaxcept_serve.service import EngineService
from tests.live_server import serving
from tests.sizes import SHIPPED

Json = dict[str, Any]
PROMPT = "The number is"


@pytest.fixture(scope="module")
def llm(slow_costs: Path):
    made = AsyncLLM(**SHIPPED, cost_model=slow_costs)
    yield made
    made.close()


@pytest.fixture(params=[None])
def run(llm: AsyncLLM, request: pytest.FixtureRequest):
    """Runs a test against a fresh application; the parameter bounds what a key may have in flight."""
    service = EngineService(llm, ["shipped"])
    keys = (ApiKey("me", "mine"), ApiKey("other", "theirs"))
    options = ServerOptions(api_keys=keys, max_concurrent_per_key=request.param)
    app = create_app(service, options, extra_routes=[routes_of(service)])

    def do(test: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]) -> None:
        async def whole(url: str) -> None:
            async with httpx.AsyncClient(base_url=url, headers={"authorization": "Bearer mine"}) as client:
                await asyncio.wait_for(test(client), 60)

        with serving(app) as url:
            asyncio.run(whole(url))

    return do


async def post(client: httpx.AsyncClient, path: str, status: int = 200, **body: Any) -> Json:
    answer = await client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def start(client: httpx.AsyncClient, **fields: Any) -> Json:
    """A generation that its fourth token intercepts."""
    greedy = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True}
    plain = await post(client, "/v1/generate", **greedy, max_tokens=4)
    assert plain["status"] == "finished" and plain["finish_reason"] == "length" and len(plain["token_ids"]) == 4
    trigger = {"token_ids": [plain["token_ids"][3]]}
    return await post(client, "/v1/generate", **{**greedy, "max_tokens": 8, "triggers": trigger, **fields})


@pytest.mark.parametrize("run", [2], indirect=True)
def test_a_key_has_so_many_generations_that_wait(run: Any):
    async def test(client: httpx.AsyncClient) -> None:
        opened = [(await start(client, timeout_s=86400))["interception"] for _ in range(2)]
        assert all(each["expires_at"] - each["opened_at"] <= 3601 for each in opened), "as long as a hold at most"
        body = {"prompt": PROMPT, "max_tokens": 1}
        full = await client.post("/v1/generate", json=body)
        assert full.status_code == 429 and full.headers["retry-after"]
        other = await client.post("/v1/generate", json=body, headers={"authorization": "Bearer theirs"})
        assert other.status_code == 200, "the other key's are its own"
        for each in opened:
            assert (await client.delete(f"/v1/interceptions/{each['id']}")).status_code == 200
        await post(client, "/v1/generate", **body)

    run(test)


def test_an_interception_is_answered_by_its_id(run: Any, llm: AsyncLLM):
    async def test(client: httpx.AsyncClient) -> None:
        first = await start(client)
        opened = first["interception"]
        assert first["status"] == "intercepted" and opened["status"] == "open" and opened["text"] == first["text"]
        assert opened["trigger"].startswith("token:") and opened["expires_at"] > opened["opened_at"]
        path = f"/v1/interceptions/{opened['id']}"
        assert (await client.get(path)).json() == opened
        ids = llm.session.tokenizer.encode(" 7 and", False)
        rest = await post(client, f"{path}/resume", token_ids=ids)
        while rest["status"] == "intercepted":
            rest = await post(client, f"/v1/interceptions/{rest['interception']['id']}/resume", text="")
        assert rest["status"] == "finished" and rest["finish_reason"] == "length"
        assert rest["usage"]["completion_tokens"] == 8 and rest["usage"]["jaxcept"]["returned_tokens"] >= len(ids)
        assert rest["usage"]["jaxcept"]["intercepted_s"] > 0
        await post(client, f"{path}/resume", 409, text="again")
        assert (await client.get(path)).status_code == 409

    run(test)


def test_a_stream_stays_open_while_another_request_answers(run: Any):
    async def test(client: httpx.AsyncClient) -> None:
        trigger = (await start(client))["interception"]["trigger"]
        body = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "max_tokens": 8, "stream": True}
        body["triggers"] = {"token_ids": [int(trigger.removeprefix("token:"))]}
        answered: list[asyncio.Task[Json]] = []
        kinds: list[str] = []
        async with client.stream("POST", "/v1/generate", json=body) as stream:
            async for line in stream.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                item = json.loads(line[6:])
                kinds.append(item["type"])
                if item["type"] == "intercepted":
                    path = f"/v1/interceptions/{item['interception']['id']}/resume"
                    answered.append(asyncio.create_task(post(client, path, 202, text=" seven ")))
        assert kinds[0] == "generated" and kinds[-1] == "finished" and kinds.count("generated") >= 8
        assert kinds.count("intercepted") == kinds.count("returned") == len(answered) >= 1
        assert {told["status"] for told in await asyncio.gather(*answered)} == {"resumed"}

    run(test)


def test_answers_and_prompts_in_pieces(run: Any, llm: AsyncLLM):
    async def test(client: httpx.AsyncClient) -> None:
        ids = llm.session.tokenizer.encode("One two three four five six", True)
        greedy = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
        whole = await post(client, "/v1/generate", prompt=ids, **greedy)
        first = await post(client, "/v1/generate", prompt=ids[:3], open=True, **greedy)
        assert first["status"] == "intercepted" and first["text"] == ""
        path = f"/v1/interceptions/{first['interception']['id']}/resume"
        for token_id in ids[3:-1]:
            told = await post(client, path, 202, token_ids=[token_id], more=True)
            assert told["status"] == "computing"
        rest = await post(client, path, token_ids=ids[-1:])
        assert rest["token_ids"] == whole["token_ids"]
        assert rest["usage"]["jaxcept"]["recomputed_tokens"] == 0

    run(test)


def test_what_an_answer_cannot_be(run: Any):
    async def test(client: httpx.AsyncClient) -> None:
        opened = (await start(client, timeout_s=600))["interception"]
        path = f"/v1/interceptions/{opened['id']}/resume"
        assert (await post(client, path, 400, text="a", token_ids=[1]))["error"]["param"] == "text"
        await post(client, path, 400)
        assert (await post(client, path, 400, token_ids=[1] * 1000))["error"]["param"] == "token_ids"
        assert (await post(client, path, 400, token_ids=[10**6]))["error"]["param"] == "token_ids"
        await post(client, path, 400, token_ids=[-1])
        await post(client, path, 400, text="x" * 100_000)
        await post(client, path, 400, token_ids=[], more=True)
        await post(client, "/v1/interceptions/int_nobody/resume", 404, text="a")
        stranger = {"authorization": "Bearer theirs"}
        assert (await client.get(f"/v1/interceptions/{opened['id']}", headers=stranger)).status_code == 404
        both = await asyncio.gather(*(client.post(path, json={"text": " 7"}) for _ in range(2)))
        assert sorted(answer.status_code for answer in both) == [200, 409]
        ended = (await start(client))["interception"]
        assert (await client.delete(f"/v1/interceptions/{ended['id']}")).json()["deleted"]
        assert (await client.delete(f"/v1/interceptions/{ended['id']}")).status_code == 410
        for field, value in (("prompt", 7), ("prompt", [-1]), ("prompt", []), ("timeout_s", 0), ("on_timeout", "x")):
            answer = await post(client, "/v1/generate", 400, **{"prompt": "a", field: value})
            assert str(answer["error"]["param"]).startswith(field)

    run(test)


@pytest.mark.parametrize(("on_timeout", "reason"), [("end", "tool_timeout"), ("tell", "length")])
def test_an_interception_that_nobody_answers(run: Any, on_timeout: str, reason: str):
    async def test(client: httpx.AsyncClient) -> None:
        trigger = (await start(client))["interception"]["trigger"]
        body = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "max_tokens": 8, "stream": True}
        body |= {"triggers": {"token_ids": [int(trigger.removeprefix("token:"))]}, "timeout_s": 0.05}
        answer = await client.post("/v1/generate", json={**body, "on_timeout": on_timeout})
        items = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        opened = next(item["interception"] for item in items if item["type"] == "intercepted")
        assert items[-1]["finish_reason"] == reason
        assert (await client.get(f"/v1/interceptions/{opened['id']}")).status_code == 410

    run(test)


def test_a_listener_that_leaves(run: Any, llm: AsyncLLM):
    """While it generates, the generation ends; while it is intercepted, it waits on."""

    async def test(client: httpx.AsyncClient) -> None:
        opened = (await start(client))["interception"]  # nobody listens any more
        assert (await client.get(f"/v1/interceptions/{opened['id']}")).json()["status"] == "open"
        body = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "max_tokens": 200}
        task = asyncio.create_task(client.post("/v1/generate", json=body))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for _ in range(200):
            figures = await llm.ask(lambda session: session.engine.metrics())
            if not figures["num_running"] + figures["num_waiting"]:
                break
            await asyncio.sleep(0.02)
        assert not figures["num_running"] and figures["num_intercepted"] >= 1
        await client.delete(f"/v1/interceptions/{opened['id']}")

    run(test)


def test_a_forgotten_interception_ends_its_generation(run: Any, llm: AsyncLLM):
    async def test(client: httpx.AsyncClient) -> None:
        opened = (await start(client, timeout_s=0.1, max_tokens=200))["interception"]
        for _ in range(200):
            if (await client.get(f"/v1/interceptions/{opened['id']}")).status_code == 410:
                break
            await asyncio.sleep(0.02)
        figures = await llm.ask(lambda session: session.engine.metrics())
        assert figures["finished_abort"] >= 1 and not figures["num_running"] + figures["num_waiting"]

    run(test)
