"""`jaxcept`: generate, chat, simulate, bench, models."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import jaxcept
from jaxcept.build import architectures, describe_model, obey_host, profile_model
from jaxcept.config import IMPLEMENTATIONS, KV_CACHE_DTYPES, EngineConfig, Hosts, shipped_model
from jaxcept.hosts import EXIT_HOST_LOST
from jaxcept.llm import LLM
from jaxcept.outputs import RequestOutput
from jaxcept.runner.crew import HostLostError
from jaxcept.runner.memory import claim_device
from jaxcept.scheduler.durations import ESTIMATORS
from jaxcept.scheduler.orders import ORDERS
from jaxcept.scheduler.params import SamplingParams
from jaxcept.scheduler.policies.catalog import POLICIES
from jaxcept.text.reasoning import REASONING_PARSERS
from jaxcept.tools.definition import Tool
from jaxcept.tools.load import load_tools
from jaxcept.tools.parsers import PARSERS
from jaxcept_serve import bench, convert, plan
from jaxcept_serve.optional import add_optional

COST_FIELDS = (
    "overhead_s", "floor_s", "token_s", "context_token_s", "pair_s", "saturation_tokens", "kv_token_bytes",
    "swap_out_latency_s", "swap_out_token_s", "swap_in_latency_s", "swap_in_token_s",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status: 0, 2 where the user's input was wrong, 72 where another host was lost."""
    claim_device()
    args = make_parser().parse_args(argv)
    if args.command is None:
        make_parser().print_help()
        return 2
    try:
        status: int = obey(args) if is_obeying(args) else args.run(args)
    except HostLostError as error:
        print(f"jaxcept {args.command}: {error}", file=sys.stderr)
        return EXIT_HOST_LOST
    except (ValueError, FileNotFoundError) as error:
        print(f"jaxcept {args.command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"jaxcept {args.command}: {error}: pip install 'jaxcept[serve]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def is_obeying(args: argparse.Namespace) -> bool:
    """Whether this is another host than the first, which does the same whatever the command. `serve` sees for itself:
    its flags may stand in a file."""
    return args.command != "serve" and bool(getattr(args, "host_id", 0))


def obey(args: argparse.Namespace) -> int:
    """Any command on another host than the first."""
    config = make_config(args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    obey_host(config, lambda done, total, what: None)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="jaxcept", description="LLM inference for generations that use tools.")
    parser.add_argument("--version", action="version", version=f"jaxcept {jaxcept.__version__}")
    commands = parser.add_subparsers(dest="command")
    generate = commands.add_parser("generate", help="complete prompts", description="Completes prompts.")
    generate.add_argument("prompts", nargs="*", help="prompts; none: one a line from standard input")
    generate.add_argument("--json", action="store_true", help="one JSON object a line, with tokens and interceptions")
    generate.set_defaults(run=run_generate)
    chat = commands.add_parser("chat", help="talk to a model", description="Talks to a model; /quit ends it.")
    chat.add_argument("--system", help="system prompt")
    chat.set_defaults(run=run_chat)
    for command in (generate, chat):
        add_engine_flags(command)
        add_sampling_flags(command)
    add_optional(commands, "serve", "serve", lambda serve: serve.add_command(commands, add_engine_flags))
    bench.add_commands(commands)
    convert.add_command(commands)
    plan.add_command(commands)
    measure = commands.add_parser(
        "profile",
        help="measure this device with a model",
        description="Measures the seconds of steps and swaps and writes a cost model, by which contexts are placed.",
    )
    measure.add_argument("--out", type=Path, help="file to write (default: the standard output)")
    measure.add_argument(
        "--brief", action="store_true", help="some seconds only, as an engine does when it first starts"
    )
    add_engine_flags(measure)
    measure.set_defaults(run=run_profile)
    models = commands.add_parser("models", help="supported architectures, or what a folder holds")
    models.add_argument("folder", nargs="?", type=Path)
    models.set_defaults(run=run_models)
    return parser


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of EngineConfig, by the names that users of vLLM know."""
    group = parser.add_argument_group("engine")
    group.add_argument("--model", help="Hugging Face folder (default: the small model that comes with jaxcept)")
    group.add_argument("--tokenizer", help="folder of the tokenizer (default: the model's)")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    group.add_argument(
        "--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES, help="int8: twice the contexts in the same memory"
    )
    group.add_argument("--load-format", default="auto", choices=["auto", "dummy"])
    group.add_argument("--implementation", default="auto", choices=IMPLEMENTATIONS, help="who computes attention")
    group.add_argument("--max-model-len", type=int)
    group.add_argument("--max-num-seqs", type=int)
    group.add_argument("--max-num-batched-tokens", type=int)
    group.add_argument("--block-size", type=int, default=16)
    group.add_argument(
        "--num-gpu-blocks-override", type=int, dest="num_blocks", help="blocks of the KV pool (default: what fits)"
    )
    group.add_argument("--gpu-memory-utilization", type=float, default=0.9, dest="memory_utilization")
    group.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True, help="(default: on)"
    )
    group.add_argument(
        "--intercept-policy", default="min-waste", choices=POLICIES, help="where contexts wait for their tools"
    )
    group.add_argument("--host-pool-gb", type=float, help="GiB of host memory for them (default: 4 on a GPU)")
    group.add_argument("--queue-order", default="fcfs", choices=ORDERS)
    group.add_argument(
        "--return-head-start",
        type=float,
        metavar="SECONDS",
        dest="return_head_start_s",
        help="most that a tool's return is ahead of newcomers in the queue (default: the policy's, 300 for min-waste)",
    )
    group.add_argument(
        "--speculative-config",
        metavar="JSON",
        help="guess tokens from what a sequence holds and verify them in one step: "
        """'{"method": "ngram", "num_speculative_tokens": 8}'""",
    )
    group.add_argument("--duration-estimator", default="survival", choices=ESTIMATORS)
    group.add_argument("--cost-model", help="file of `jaxcept profile` (default: measured at the first start)")
    group.add_argument("--chat-template", help="file of a chat template, or the template itself")
    group.add_argument("--tool-call-parser", default="auto", choices=["auto", *PARSERS])
    group.add_argument(
        "--reasoning-parser",
        default="auto",
        choices=["auto", "none", *REASONING_PARSERS],
        help="how thoughts are told apart from what is said (default: as the chat template shows them)",
    )
    group.add_argument("--tensor-parallel-size", type=int, default=1, help="devices that share every layer")
    group.add_argument(
        "--data-parallel-size", type=int, default=1, help="groups of devices that share the tokens of a step"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="host 0 of several; the port after it is used too")
    group.add_argument("--num-hosts", type=int, default=1, help="hosts that share one engine, each with this command")
    group.add_argument("--host-id", type=int, default=0, help="which of them this is; 0 serves, the others obey")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--tools",
        action="append",
        metavar="MODULE[:NAME]",
        help="Python module or file whose @tool functions the model may call; may be repeated (default: the built-in "
        "tools for the shipped model, none for others); 'none' for none",
    )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of SamplingParams."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=256)
    group.add_argument("--temperature", type=float, default=0.0)
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--top-k", type=int, default=0)
    group.add_argument("--min-p", type=float, default=0.0)
    group.add_argument("--n", type=int, default=1)
    group.add_argument("--stop", action="append", default=[])


def run_profile(args: argparse.Namespace) -> int:
    """`jaxcept profile`."""
    console = Console(stderr=True)
    with console.status("") as status:
        costs = profile_model(
            make_config(args), lambda done, total, what: status.update(f"{what} ({done} of {total})"), args.brief
        )
    table = Table(title=f"{costs.name}", title_justify="left")
    for title in ("", "value", "from"):
        table.add_column(title, overflow="fold")
    for name in COST_FIELDS:
        table.add_row(name, f"{getattr(costs, name):.6g}", costs.sources.get(name, ""))
    console.print(table)
    if args.out is None:
        print(costs.to_json(), end="")
    else:
        costs.save(args.out)
    return 0


def make_llm(args: argparse.Namespace) -> LLM:
    """The engine that the flags ask for."""
    return LLM(args.model, **engine_options(args))


def make_config(args: argparse.Namespace) -> EngineConfig:
    """The configuration that the flags ask for."""
    return EngineConfig(args.model, **engine_options(args))


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Flags by the names of EngineConfig's fields."""
    names = (
        "tokenizer", "dtype", "kv_cache_dtype", "load_format", "max_model_len", "max_num_seqs",
        "max_num_batched_tokens", "block_size", "num_blocks", "memory_utilization", "enable_prefix_caching",
        "intercept_policy", "host_pool_gb", "queue_order", "return_head_start_s", "speculative_config",
        "duration_estimator", "cost_model", "chat_template", "tool_call_parser", "reasoning_parser", "implementation",
        "tensor_parallel_size", "data_parallel_size", "seed",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names} | {"hosts": make_hosts(args)}


def make_hosts(args: argparse.Namespace) -> Hosts | None:
    """The hosts that the flags name; None for this one alone. ValueError where the flags are not whole."""
    if args.coordinator is None and args.num_hosts == 1 and args.host_id == 0:
        return None
    if args.coordinator is None:
        raise ValueError(f"--num-hosts {args.num_hosts} --host-id {args.host_id}: --coordinator is missing")
    return Hosts(args.coordinator, args.num_hosts, args.host_id)


def make_sampling(args: argparse.Namespace) -> SamplingParams:
    """The sampling parameters that the flags ask for."""
    return SamplingParams(
        n=args.n,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        max_tokens=args.max_tokens,
        stop=args.stop,
        seed=args.seed,
    )


def make_tools(args: argparse.Namespace) -> list[Tool | Callable[..., Any]] | None:
    """The tools that the flags name; None for none."""
    if args.tools is None:
        return load_tools("jaxcept.tools.builtin") if args.model is None else None
    return [tool for spec in args.tools if spec != "none" for tool in load_tools(spec)] or None


def run_generate(args: argparse.Namespace) -> int:
    """`jaxcept generate`."""
    prompts = args.prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ValueError("no prompts: expected some as arguments, or one a line on standard input")
    params, tools = make_sampling(args), make_tools(args)
    outputs = make_llm(args).generate(prompts, params, tools=tools)
    for prompt, output in zip(prompts, outputs, strict=True):
        print(json.dumps(as_record(prompt, output), ensure_ascii=False) if args.json else as_text(prompt, output))
    return 0


def as_record(prompt: str, output: RequestOutput) -> dict[str, Any]:
    """One request as JSON."""
    return {
        "prompt": prompt,
        "completions": [
            {
                "text": completion.text,
                "answer": completion.answer,
                "token_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
                "interceptions": [
                    {
                        "calls": [
                            {"name": c.name, "arguments": c.arguments, "result": c.result, "is_error": c.is_error}
                            for c in each.calls
                        ],
                        "duration_s": each.duration_s,
                        "context": each.residency,
                        "num_recomputed": each.num_recomputed,
                    }
                    for each in completion.interceptions
                ],
            }
            for completion in output.outputs
        ],
    }


def as_text(prompt: str, output: RequestOutput) -> str:
    """One request for a person to read."""
    lines = [f"> {prompt}"]
    for completion in output.outputs:
        for each in completion.interceptions:
            for call in each.calls:
                arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
                lines.append(f"  {call.name}({arguments}) → {call.result}")
        lines.append(completion.answer if completion.interceptions else completion.text)
    return "\n".join(lines)


def run_chat(args: argparse.Namespace) -> int:
    """`jaxcept chat`."""
    params, tools, llm = make_sampling(args), make_tools(args), make_llm(args)
    console = Console()
    system = [{"role": "system", "content": args.system}] if args.system else []
    messages: list[dict[str, Any]] = list(system)
    while True:
        try:
            text = console.input("[bold]> [/bold]")
        except EOFError:
            return 0
        if text.strip() == "/quit":
            return 0
        if text.strip() == "/clear":
            messages = list(system)
        elif text.strip():
            messages.append({"role": "user", "content": text})
            answer = answer_turn(llm, messages, params, tools, console)
            messages.append({"role": "assistant", "content": answer})


def answer_turn(
    llm: LLM,
    messages: list[dict[str, Any]],
    params: SamplingParams,
    tools: list[Tool | Callable[..., Any]] | None,
    console: Console,
) -> str:
    """Streams one turn to the console; the model's answer after its last tool call."""
    answer = ""
    for delta in llm.chat_stream(messages, params, tools=tools):
        if delta.kind == "returned":
            console.print(delta.text.strip(), style="dim", markup=False, highlight=False)
        elif delta.kind == "intercepted":
            console.print(f"\n[{delta.trigger} …]", style="dim cyan", markup=False)
        elif delta.text:
            console.print(delta.text, end="", markup=False, highlight=False)
        if delta.output is not None:
            answer = delta.output.outputs[0].answer
    console.print()
    return answer


def run_models(args: argparse.Namespace) -> int:
    """`jaxcept models`."""
    console = Console()
    if args.folder is not None:
        table = Table(title=str(args.folder), show_header=False)
        for name, value in describe_model(args.folder).items():
            table.add_row(name, value)
        console.print(table)
        return 0
    table = Table(title="supported architectures")
    table.add_column("architecture")
    table.add_column("models")
    for name in architectures():
        table.add_row(name, _EXAMPLES.get(name, ""))
    console.print(table)
    console.print(f"shipped model: {shipped_model()}", highlight=False)
    return 0


_EXAMPLES = {
    "GPTJForCausalLM": "GPT-J",
    "LlamaForCausalLM": "Llama 2, 3, 3.1, 3.2, 3.3, Vicuna",
    "MistralForCausalLM": "Mistral",
    "MixtralForCausalLM": "Mixtral",
    "Qwen2ForCausalLM": "Qwen2, Qwen2.5",
    "Qwen3ForCausalLM": "Qwen3",
    "Qwen3MoeForCausalLM": "Qwen3-30B-A3B, Qwen3-235B-A22B",
}

if __name__ == "__main__":
    sys.exit(main())
