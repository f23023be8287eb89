"""`jaxcept bench serve` against a server that one can check by hand."""

import asyncio
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
import uvicorn
from rich.console import Console
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxcept_serve import cli
from jaxcept_serve.bench_client import Ask, Load, Replay, Sample
from jaxcept_serve.bench_scripts import Shape, answers, make_scripts
from jaxcept_serve.bench_serve import Quantiles, figures, make_table, read_targets

SHAPE = Shape(turns=3, words_first=8, words_later=2)


class Fake:
    """Counts words as tokens, remembers what it saw, and calls the calculator once after each message of the user."""

    def __init__(self, fails_at: int | None = None, tells_usage: bool = True) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.fails_at = fails_at
        self.tells_usage = tells_usage
        self.seen: set[str] = set()  # prompts that are cached
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.answer, methods=["POST"]),
                Route("/v1/completions", self.answer, methods=["POST"]),
            ]
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": "fake"}]})

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if self.fails_at == len(self.bodies):
            return JSONResponse({"error": {"message": "no more"}}, 503)
        prompt = body["prompt"] if "prompt" in body else " ".join(str(m["content"]) for m in body["messages"])
        cached = max((len(old.split()) for old in self.seen if prompt.startswith(old)), default=0)
        self.seen.add(prompt)
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": 2,
                 "prompt_tokens_details": {"cached_tokens": cached}}  # fmt: skip
        wants_tool = "tools" in body and body["messages"][-1]["role"] == "user"
        if not body["stream"]:
            return JSONResponse({"choices": [{"message": {"content": "so it"}}], "usage": usage})
        return StreamingResponse(self.chunks(body, usage, wants_tool), media_type="text/event-stream")

    async def chunks(self, body: dict[str, Any], usage: dict[str, Any], wants_tool: bool) -> AsyncIterator[str]:
        deltas: list[dict[str, Any]] = [{"content": "so"}, {"content": " it"}]
        if wants_tool:
            expression = body["messages"][-1]["content"].removeprefix("What is ").removesuffix("?")
            arguments = json.dumps({"expression": expression})
            deltas = [
                {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "calculator", "arguments": ""}}]},
                {"tool_calls": [{"index": 0, "function": {"arguments": arguments[:9]}}]},
                {"tool_calls": [{"index": 0, "function": {"arguments": arguments[9:]}}]},
            ]
        yield 'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
        for delta in deltas:
            await asyncio.sleep(0.001)
            choice = {"text": delta["content"]} if "prompt" in body else {"delta": delta}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        if self.tells_usage:
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


def replay(fake: Fake, dataset: str = "words", count: int = 2, load: Load | None = None, **ask: Any) -> list[Sample]:
    """The samples of one round."""

    async def run() -> list[Sample]:
        transport = httpx2.ASGITransport(app=fake.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://fake/v1") as client:
            runner = Replay(client, Ask("fake", **ask), load or Load(pause_s=0.0))
            return await runner.run(make_scripts(dataset, count, SHAPE, seed=1))

    return asyncio.run(run())


def test_later_turns_send_the_conversation_with_the_models_own_words():
    fake = Fake()
    samples = replay(fake, count=1, extra={"priority": 2})
    assert [sample.turn for sample in samples] == [0, 1, 2] and not any(sample.error for sample in samples)
    roles = [[message["role"] for message in body["messages"]] for body in fake.bodies]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"],
                     ["system", "user", "assistant", "user", "assistant", "user"]]  # fmt: skip
    assert fake.bodies[1]["messages"][2] == {"role": "assistant", "content": "so it"}
    assert fake.bodies[0]["stream_options"] == {"include_usage": True} and fake.bodies[0]["priority"] == 2
    first, second = samples[:2]
    assert (first.prompt_tokens, first.cached_tokens, first.completion_tokens) == (8, 0, 2)
    assert second.prompt_tokens == 8 + 2 + 2 and second.cached_tokens == 8
    assert first.ttft_s is not None and 0 < first.ttft_s < first.seconds


def test_conversations_share_their_beginning_and_nothing_else():
    one, other = make_scripts("words", 2, SHAPE, seed=5)
    assert one.opening[0] == other.opening[0] and one.opening[1] != other.opening[1] and one.steps != other.steps
    assert make_scripts("words", 2, SHAPE, seed=5) == [one, other] != make_scripts("words", 2, SHAPE, seed=6)


def test_calls_of_the_calculator_are_answered_with_their_ids():
    fake = Fake()
    samples = replay(fake, "calculator", count=1)
    roles = [[message["role"] for message in body["messages"]] for body in fake.bodies]
    assert roles == [["user"], ["user", "assistant", "tool"], ["user", "assistant", "tool", "assistant", "user"]]
    call, answer = fake.bodies[1]["messages"][1:]
    left, right = json.loads(call["tool_calls"][0]["function"]["arguments"])["expression"].split(" * ")
    assert answer == {"role": "tool", "tool_call_id": "c1", "content": str(int(left) * int(right))}
    assert all(sample.ttft_s is not None for sample in samples)


def test_recorded_tools_answer_whatever_the_model_calls(tmp_path: Path):
    path = tmp_path / "talk.jsonl"
    messages = [{"role": "user", "content": "weather?"}, {"role": "assistant", "content": None},
                {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "it rains"},
                {"role": "user", "content": "thanks"}]  # fmt: skip
    path.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    (script,) = make_scripts(str(path), 1, SHAPE, seed=0)
    assert script.num_requests == 3
    call = {"id": "x", "function": {"name": "weather", "arguments": "{}"}}
    assert answers(script.steps[0], [call]) == ([{"role": "tool", "tool_call_id": "x", "content": "rain"}], True)
    assert answers(script.steps[0], []) == ([{"role": "user", "content": "rain"}], True)
    path.write_text('{"messages": [{"role": "user"}]}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"talk.jsonl:1: expected"):
        make_scripts(str(path), 1, SHAPE, seed=0)


def test_completions_send_the_text_on():
    fake = Fake()
    samples = replay(fake, count=1, api="completions", ignore_eos=True)
    assert fake.bodies[1]["prompt"].startswith(fake.bodies[0]["prompt"] + "so it\n") and fake.bodies[0]["ignore_eos"]
    assert samples[1].cached_tokens == 8


def test_without_streaming_there_is_no_first_token():
    samples = replay(Fake(), count=1, is_streamed=False)
    assert [sample.ttft_s for sample in samples] == [None] * 3 and samples[0].completion_tokens == 2
    assert figures([samples]).first_ttft is None


def test_an_error_ends_its_conversation_alone():
    samples = replay(Fake(fails_at=1), count=2, load=Load(pause_s=0.0, concurrency=1))
    assert [sample.error is not None for sample in samples] == [True, False, False, False]
    assert samples[0].error is not None and "503" in samples[0].error and samples[0].ttft_s is None


def test_concurrency_and_rate_bound_what_comes():
    samples = replay(Fake(), count=3, load=Load(pause_s=0.0, concurrency=1))
    assert [sample.conversation for sample in samples] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    began = {s.conversation: s.started_s for s in replay(Fake(), count=4, load=Load(0.0, rate=100.0)) if not s.turn}
    assert began[0] < began[1] < began[2] < began[3]


def test_figures_by_hand():
    samples = [Sample(0, 0, 0.0, 1.0, 0.5, 100, 0, 10), Sample(0, 1, 2.0, 1.0, 0.1, 120, 110, 10),
               Sample(1, 1, 2.0, 2.0, 0.3, 130, 60, 20), Sample(2, 0, 0.0, 0.1, error="503")]  # fmt: skip
    one = figures([samples])
    assert (one.num_requests, one.num_errors, one.seconds, one.tokens_per_s) == (4, 1, 4.0, 10.0)
    assert one.first_ttft == Quantiles(0.5, 0.5, 0.5) and one.resume_ttft == Quantiles(0.3, 0.3, 0.3)
    assert one.conversation == Quantiles(3.0, 3.0, 3.0), "of 2 s and 3 s; the third ended with an error"
    assert (one.prompt_tokens, one.cached_tokens, one.computed_tokens) == (350, 170, 180)
    console = Console(width=100, file=io.StringIO())
    console.print(make_table({"ours": one, "theirs": figures([[Sample(0, 0, 0.0, 1.0)]])}, "title"))
    text = cast(io.StringIO, console.file).getvalue()
    assert "170 (48.6%)" in text and "not told" in text and "ours" in text and "theirs" in text


def test_targets_have_names():
    assert read_targets(["http://a:1", "b=http://b:2/v1"]) == {"http://a:1": "http://a:1", "b": "http://b:2/v1"}
    with pytest.raises(ValueError, match="two servers"):
        read_targets(["a=http://x", "a=http://y"])
    with pytest.raises(ValueError, match="expected http"):
        read_targets(["ftp://x"])


@pytest.fixture
def two_urls() -> Iterator[tuple[str, str, Fake]]:
    """Two servers on loopback; the second tells no usage."""
    fakes = (Fake(), Fake(tells_usage=False))
    servers = [uvicorn.Server(uvicorn.Config(f.app, port=0, log_level="error", lifespan="off")) for f in fakes]
    threads = [threading.Thread(target=server.run, daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    while not all(server.started for server in servers):
        threads[0].join(0.01)
    ports = [server.servers[0].sockets[0].getsockname()[1] for server in servers]
    yield f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}/v1", fakes[0]
    for server, thread in zip(servers, threads, strict=True):
        server.should_exit = True
        thread.join(10)


def test_the_command_prints_one_table_for_all(
    two_urls: tuple[str, str, Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first, second, fake = two_urls
    out = tmp_path / "bench.json"
    flags = ["--url", f"ours={first}", "--url", f"theirs={second}", "--conversations", "3", "--turns", "2", "--pause",
             "0.01", "--rounds", "2", "--api-key", "secret", "--out", str(out)]  # fmt: skip
    assert cli.main(["bench", "serve", *flags]) == 0
    printed = capsys.readouterr().out
    assert "TTFT, resumes, p95, s" in printed and "ours" in printed and "not told" in printed
    record = json.loads(out.read_text(encoding="utf-8"))
    assert "secret" not in out.read_text(encoding="utf-8") and record["settings"]["conversations"] == 3
    ours, theirs = record["servers"]["ours"]["figures"], record["servers"]["theirs"]["figures"]
    assert ours["num_requests"] == theirs["num_requests"] == 12 and ours["num_errors"] == 0
    assert ours["first_ttft"]["p50"] > 0 and theirs["resume_ttft"]["p99"] > 0
    assert ours["cached_tokens"] > 0 and theirs["cached_tokens"] is None
    assert [len(each) for each in record["servers"]["theirs"]["rounds"]] == [6, 6]
    assert fake.bodies[0]["model"] == "fake"


def test_a_server_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "serve", "--url", "http://127.0.0.1:9", "--timeout", "2"]) == 2
    assert "http://127.0.0.1:9" in capsys.readouterr().err
