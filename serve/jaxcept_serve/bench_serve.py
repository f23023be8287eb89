"""`jaxcept bench serve`: conversations with pauses against any OpenAI-compatible server; one table for all engines."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jaxcept_serve.bench_scripts import DATASETS, Shape, make_scripts

if TYPE_CHECKING:
    from jaxcept_serve.bench_client import Ask, Load, Sample


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of seconds, by the nearest rank."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Quantiles | None:
        """None where no value is known."""
        known = sorted(value for value in values if value is not None)
        if not known:
            return None
        return cls(*(known[min(len(known) - 1, int(share * len(known)))] for share in (0.5, 0.95, 0.99)))


@dataclass(frozen=True, slots=True)
class Figures:
    """One server's run in numbers. Seconds; token counts as its usage told them, None where it did not."""

    num_requests: int
    num_errors: int
    seconds: float  # all rounds together
    tokens_per_s: float | None
    requests_per_s: float
    first_ttft: Quantiles | None  # of first turns
    resume_ttft: Quantiles | None  # of all later turns
    latency: Quantiles | None
    conversation: Quantiles | None  # from its first request to the end of its last, pauses included
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None

    @property
    def computed_tokens(self) -> int | None:
        """Prompt tokens that were not cached."""
        if self.prompt_tokens is None or self.cached_tokens is None:
            return None
        return self.prompt_tokens - self.cached_tokens


def figures(rounds: Sequence[Sequence[Sample]]) -> Figures:
    """Puts the samples of a server's rounds into numbers."""
    samples = [sample for each in rounds for sample in each]
    good = [sample for sample in samples if sample.error is None]
    seconds = sum(max((s.started_s + s.seconds for s in each), default=0.0) for each in rounds)
    generated = _total([sample.completion_tokens for sample in good])
    return Figures(
        num_requests=len(samples),
        num_errors=len(samples) - len(good),
        seconds=seconds,
        tokens_per_s=generated / seconds if generated is not None and seconds else None,
        requests_per_s=len(good) / seconds if seconds else 0.0,
        first_ttft=Quantiles.of([s.ttft_s for s in good if not s.turn]),
        resume_ttft=Quantiles.of([s.ttft_s for s in good if s.turn]),
        latency=Quantiles.of([sample.seconds for sample in good]),
        conversation=Quantiles.of([seconds for each in rounds for seconds in _conversations(each)]),
        prompt_tokens=_total([sample.prompt_tokens for sample in good]),
        cached_tokens=_total([sample.cached_tokens for sample in good]),
        completion_tokens=generated,
    )


def _conversations(samples: Sequence[Sample]) -> list[float]:
    """How long each conversation of a round took; those with an error are left out."""
    by_number: dict[int, list[Sample]] = {}
    for sample in samples:
        by_number.setdefault(sample.conversation, []).append(sample)
    return [
        max(sample.started_s + sample.seconds for sample in each) - min(sample.started_s for sample in each)
        for each in by_number.values()
        if all(sample.error is None for sample in each)
    ]


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def make_table(found: dict[str, Figures], title: str) -> Table:
    """One column a server, the same rows for all."""
    table = Table(title=title)
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right", overflow="fold")

    def row(name: str, *cells: str) -> None:
        table.add_row(name, *cells)

    each = list(found.values())
    row("requests", *(f"{one.num_requests:,}" for one in each))
    row("errors", *(f"{one.num_errors:,}" for one in each))
    row("seconds", *(f"{one.seconds:.1f}" for one in each))
    row("requests/s", *(f"{one.requests_per_s:.2f}" for one in each))
    row("generated tokens/s", *(_shown(one.tokens_per_s, "{:.1f}") for one in each))
    for share in ("p50", "p95", "p99"):
        row(f"TTFT, first turns, {share}, s", *(_part(one.first_ttft, share) for one in each))
    for share in ("p50", "p95", "p99"):
        row(f"TTFT, resumes, {share}, s", *(_part(one.resume_ttft, share) for one in each))
    for share in ("p50", "p95", "p99"):
        row(f"whole request, {share}, s", *(_part(one.latency, share) for one in each))
    for share in ("p50", "p95", "p99"):
        row(f"whole conversation, {share}, s", *(_part(one.conversation, share) for one in each))
    row("prompt tokens", *(_shown(one.prompt_tokens, "{:,}") for one in each))
    row("of them cached", *(_cached(one) for one in each))
    row("of them computed", *(_shown(one.computed_tokens, "{:,}") for one in each))
    row("generated tokens", *(_shown(one.completion_tokens, "{:,}") for one in each))
    return table


def _shown(value: float | None, form: str) -> str:
    return "not told" if value is None else form.format(value)


def _part(quantiles: Quantiles | None, share: str) -> str:
    return "-" if quantiles is None else f"{getattr(quantiles, share):.3f}"


def _cached(one: Figures) -> str:
    if one.cached_tokens is None or not one.prompt_tokens:
        return "not told"
    return f"{one.cached_tokens:,} ({one.cached_tokens / one.prompt_tokens:.1%})"


def add_command(kinds: Any) -> None:
    """Adds `serve` to the subparsers of `bench`."""
    parser = kinds.add_parser(
        "serve",
        help="conversations with tool pauses against any OpenAI-compatible server",
        description="Replays conversations of several turns, with a pause before each later one, against one or more"
        " servers in turn, and prints one table. Every later turn sends the whole conversation, as clients do.",
    )
    parser.add_argument(
        "--url", action="append", metavar="[NAME=]URL", help="server, again for each (default: http://127.0.0.1:8000)"
    )
    parser.add_argument("--model", help="name to ask for (default: the first that a server offers)")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="(default: $OPENAI_API_KEY)")
    parser.add_argument("--api", default="chat", choices=["chat", "completions"])
    talk = parser.add_argument_group("conversations")
    talk.add_argument("--conversations", type=_count, default=24, help="a round (default: %(default)s)")
    talk.add_argument("--turns", type=_count, default=6, help="of the model, each (default: %(default)s)")
    talk.add_argument(
        "--dataset", default="words", help=f"{', '.join(DATASETS)}, or a JSONL file of messages (default: words)"
    )
    talk.add_argument("--words-first", type=_count, default=200, help="of the beginning (default: %(default)s)")
    talk.add_argument("--words-later", type=_count, default=40, help="of a later message (default: %(default)s)")
    talk.add_argument("--seed", type=int, default=0)
    load = parser.add_argument_group("load")
    load.add_argument("--pause", type=_seconds, default=0.73, help="seconds before a later turn (default: %(default)s)")
    load.add_argument("--random-pauses", action="store_true", help="exponential, with --pause as their mean")
    load.add_argument("--concurrency", type=_count, help="conversations at a time (default: all)")
    load.add_argument("--rate", type=_rate, help="new conversations per second (default: all at once)")
    load.add_argument("--rounds", type=_count, default=1, help="of every server, alternating (default: %(default)s)")
    load.add_argument("--timeout", type=_rate, default=600.0, help="of a request, seconds (default: %(default)s)")
    ask = parser.add_argument_group("requests")
    ask.add_argument("--max-tokens", type=_count, default=64, help="(default: %(default)s)")
    ask.add_argument("--temperature", type=_seconds, default=0.0, help="(default: %(default)s)")
    ask.add_argument("--no-stream", action="store_true", help="whole answers; there is no TTFT then")
    ask.add_argument("--ignore-eos", action="store_true", help="always generate --max-tokens")
    ask.add_argument("--extra-body", type=_object, default={}, metavar="JSON", help="merged into every request")
    parser.add_argument("--out", type=Path, help="file for the figures and every request, as JSON")
    parser.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    """`jaxcept bench serve`; 1 where every request to some server failed."""
    from jaxcept_serve.bench_client import Ask, Load, ServerError  # noqa: PLC0415 - an HTTP client, for this alone

    if args.concurrency is not None and args.rate is not None:
        raise ValueError("--concurrency and --rate: expected one of them")
    targets = read_targets(args.url or ["http://127.0.0.1:8000"])
    load = Load(args.pause, args.random_pauses, args.concurrency, args.rate, args.seed)
    ask = Ask(args.model or "", args.api, args.max_tokens, args.temperature, not args.no_stream, args.ignore_eos,
              args.extra_body)  # fmt: skip
    console = Console()
    try:
        samples = asyncio.run(_run_all(args, targets, ask, load, console))
    except (ServerError, OSError) as error:
        raise ValueError(str(error)) from error
    found = {name: figures(rounds) for name, rounds in samples.items()}
    title = f"{args.rounds} x {args.conversations} conversations of {args.turns} turns, pauses of {args.pause:g} s"
    console.print(make_table(found, f"{title}, {args.dataset}"))
    for name, rounds in samples.items():
        errors = sorted({sample.error for each in rounds for sample in each if sample.error is not None})
        for text in errors[:5]:
            console.print(f"{name}: {text}", style="red", markup=False, highlight=False)
    if args.out is not None:
        args.out.write_text(json.dumps(as_record(args, targets, found, samples), indent=1) + "\n", encoding="utf-8")
    return int(any(one.num_errors == one.num_requests for one in found.values()))


async def _run_all(
    args: argparse.Namespace, targets: dict[str, str], ask: Ask, load: Load, console: Console
) -> dict[str, list[list[Sample]]]:
    """Every round asks every server for the same conversations; every other round the other way round."""
    from jaxcept_serve.bench_client import Replay, ServerError, first_model, open_client  # noqa: PLC0415

    shape = Shape(args.turns, args.words_first, args.words_later)
    samples: dict[str, list[list[Sample]]] = {name: [] for name in targets}
    async with AsyncExitStack() as stack:
        clients, asks = {}, {}
        for name, url in targets.items():
            clients[name] = await stack.enter_async_context(open_client(url, args.api_key, args.timeout))
            try:
                asks[name] = ask if ask.model else replace(ask, model=await first_model(clients[name]))
            except Exception as error:
                raise ServerError(f"{url}: {error}") from error
        with Progress(console=console, disable=not console.is_terminal) as progress:
            for number in range(args.rounds):
                scripts = make_scripts(args.dataset, args.conversations, shape, args.seed + number)
                order = list(targets) if number % 2 == 0 else list(reversed(targets))
                for name in order:
                    total = sum(script.num_requests for script in scripts)
                    task = progress.add_task(f"{name}, round {number + 1}", total=total)
                    replay = Replay(clients[name], asks[name], replace(load, seed=args.seed + number),
                                    lambda sample, task=task: progress.advance(task))  # type: ignore[misc]  # fmt: skip
                    samples[name].append(await replay.run(scripts))
    return samples


def read_targets(urls: Sequence[str]) -> dict[str, str]:
    """URLs by name: what stands before "=", or the URL itself. ValueError where two have one name."""
    targets: dict[str, str] = {}
    for text in urls:
        name, sign, url = text.partition("=")
        if not sign or "/" in name:
            name = url = text
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--url {text!r}: expected http://… or https://…")
        if name in targets:
            raise ValueError(f"--url: two servers are called {name!r}; write NAME=URL")
        targets[name] = url
    return targets


def as_record(
    args: argparse.Namespace,
    targets: dict[str, str],
    found: dict[str, Figures],
    samples: dict[str, list[list[Sample]]],
) -> dict[str, Any]:
    """All of it as plain values, the API key left out."""
    settings = {key: value for key, value in vars(args).items() if key not in ("api_key", "run", "out", "url")}
    return {
        "settings": settings,
        "servers": {
            name: {
                "url": targets[name],
                "figures": {**asdict(one), "computed_tokens": one.computed_tokens},
                "rounds": [[asdict(sample) for sample in each] for each in samples[name]],
            }
            for name, one in found.items()
        },
    }


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected 0 or more")
    return value


def _rate(text: str) -> float:
    value = _seconds(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text}: expected above 0")
    return value


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("expected a JSON object")
    return value
