"""`jaxcept serve`: flags, a config file and the environment become one server."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from jaxcept.build import Progress, obey_host
from jaxcept.config import EngineConfig
from jaxcept.tools.sources import SERVER_LIMITS
from jaxcept_serve.limits import ApiKey, ServerOptions
from jaxcept_serve.server import ServeConfig, ToolFlags, run
from jaxcept_serve.service import HoldOptions

ENVIRONMENT = "JAXCEPT_"
BUILT_IN_TOOLS = "jaxcept.tools.builtin"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOCAL_NAMES = ("localhost", "host.docker.internal")


def add_command(commands: Any, add_engine_flags: Callable[[argparse.ArgumentParser], None]) -> None:
    """Adds it to the command line's subparsers."""
    parser = commands.add_parser(
        "serve",
        help="serve over HTTP",
        description="Serves a model: the OpenAI and Anthropic APIs, tool calls that keep their context, a page.",
        epilog="Every flag may also stand in the file of --config (YAML or JSON, names without the dashes) and in the"
        f" environment ({ENVIRONMENT}MAX_MODEL_LEN for --max-model-len). The command line goes before the environment,"
        " which goes before the file.",
    )
    parser.add_argument("model_path", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument("--config", help="file of flags")
    add_engine_flags(parser)
    _add_server_flags(parser)
    _add_limit_flags(parser)
    _add_tool_flags(parser)
    parser.set_defaults(run=run_serve, parser=parser)


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1; 0.0.0.0 is every interface)")
    group.add_argument("--port", type=int, default=8000)
    group.add_argument("--served-model-name", nargs="+", help="names that clients may ask for (default: the folder's)")
    group.add_argument("--api-key", action="append", metavar="[NAME=]KEY", help="may be repeated; none: open to all")
    group.add_argument("--salt-secret", help="makes the keys' cache salts the same from one start to the next")
    group.add_argument(
        "--allowed-hosts",
        nargs="+",
        default=[],
        help="names in Host headers (default: any; on loopback without keys: localhost)",
    )
    group.add_argument("--allowed-origins", nargs="+", default=[], help="pages of other origins that may ask (CORS)")
    group.add_argument("--hold-ttl", type=float, default=300.0, help="seconds that a context waits for the next turn")
    group.add_argument("--max-hold-ttl", type=float, default=3600.0, help="seconds that a client may ask for")
    group.add_argument("--max-held", type=int, default=1024, help="contexts that wait for their next turn, at most")
    group.add_argument("--conversation-memory-mb", type=float, default=256.0, help="MiB for the ids of known turns")
    group.add_argument("--intercept-timeout", type=float, default=120.0, help="seconds of one interception in a turn")
    group.add_argument("--grace-s", type=float, default=30.0, help="seconds to finish what runs after SIGTERM")
    group.add_argument("--replicas", type=int, default=1, help="engines behind this server (needs the extra ray)")
    group.add_argument("--uvicorn-log-level", default="info", help="debug, info, warning, error")
    group.add_argument("--log-format", default="text", choices=["text", "json"])
    group.add_argument("--otlp-traces-endpoint", help="where traces go (needs the extra otel)")
    group.add_argument("--enable-auto-tool-choice", action="store_true", help="accepted: it always is")


def _add_limit_flags(parser: argparse.ArgumentParser) -> None:
    group, usual = parser.add_argument_group("limits"), ServerOptions()
    group.add_argument("--max-body-bytes", type=int, default=usual.max_body_bytes)
    group.add_argument("--max-concurrent", type=int, default=usual.max_concurrent, help="requests in flight")
    group.add_argument("--max-concurrent-per-key", type=int)
    group.add_argument("--requests-per-s", type=float, help="of one key")
    group.add_argument("--max-num-queued-reqs", type=int, default=usual.max_num_queued_reqs, help="0: no limit")
    group.add_argument("--max-num-queued-tokens", type=int, help="of prompts that wait: past them, none more")
    group.add_argument("--max-headers", type=int, default=usual.max_headers)
    group.add_argument("--max-header-bytes", type=int, default=usual.max_header_bytes)
    group.add_argument("--max-tools", type=int, default=usual.max_tools)
    group.add_argument("--max-schema-bytes", type=int, default=usual.max_schema_bytes)


def _add_tool_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tools that the server runs")
    group.add_argument("--mcp", action="append", default=[], metavar="NAME=COMMAND|URL|FILE",
                       help="an MCP server, or a file of them (mcpServers); may be repeated")  # fmt: skip
    group.add_argument("--openapi", action="append", default=[], metavar="FILE|URL", help="an HTTP service's tools")
    group.add_argument("--allow-tools", nargs="+", default=[], help="patterns of names to offer (default: all)")
    group.add_argument("--tool-allow-host", action="append", default=[], help="a private host that --openapi may reach")
    group.add_argument("--tool-process", action="store_true", help="Python tools run in processes of their own")
    group.add_argument("--tool-timeout", type=float, default=SERVER_LIMITS.timeout_s)
    group.add_argument("--tool-max-concurrency", type=int, default=SERVER_LIMITS.max_concurrency)
    group.add_argument("--tool-breaker-failures", type=int, default=SERVER_LIMITS.breaker_failures,
                       help="in a row, after which a tool rests")  # fmt: skip
    group.add_argument("--tool-cache-ttl", type=float, default=SERVER_LIMITS.cache_ttl_s, help="seconds, of pure tools")


def run_serve(args: argparse.Namespace) -> int:
    """`jaxcept serve`."""
    given = apply_settings(args, os.environ)
    console = Console(stderr=True)
    with console.status("starting") as status:
        config = make_config(given)
        if config.engine.hosts is not None and config.engine.hosts.host_id:
            obey_host(config.engine, lambda *told: _show(status, console, config, *told), config.grace_s)
            return 0
        if given.replicas != 1:
            return _run_replicas(config, given.replicas, lambda *told: _show(status, console, config, *told))
        return run(config, lambda done, total, what: _show(status, console, config, done, total, what))


def _run_replicas(config: ServeConfig, count: int, progress: Progress) -> int:
    if count < 1:
        raise ValueError(f"--replicas {count}: expected 1 or more")
    if config.engine.hosts is not None:
        raise ValueError(
            "--replicas with --num-hosts: an engine on several hosts has no replicas; expected one of them"
        )
    try:
        from jaxcept_serve.ray_engines import serve_replicas  # noqa: PLC0415 (optional dependency)
    except ImportError as error:
        raise ValueError(f"--replicas {count} needs Ray: pip install 'jaxcept[ray]' ({error})") from error
    return serve_replicas(config, count, progress)


def _show(status: Any, console: Console, config: ServeConfig, done: int, total: int, what: str) -> None:
    status.update(f"{what} ({done} of {total})")
    if done == total:
        status.stop()


def apply_settings(args: argparse.Namespace, environment: Mapping[str, str]) -> argparse.Namespace:
    """The flags, with what the environment and the config file say where the command line is silent.

    ValueError names a setting that there is not, or whose value is wrong.
    """
    parser: argparse.ArgumentParser = args.parser
    words: list[str] = []
    if args.config is not None:
        words += _words(parser, _read_settings(Path(args.config)), args.config)
    flags = {_variable(action): action for action in parser._actions if action.option_strings}
    known = {name: value for name, value in environment.items() if name in flags}
    words += _words(parser, {flags[name].dest: _from_text(flags[name], value) for name, value in known.items()}, "")
    if not words:
        return args
    merged = parser.parse_args(words)
    for name, value in vars(args).items():
        if value != parser.get_default(name) or name in ("run", "parser", "command"):
            setattr(merged, name, value)
    return merged


def _variable(action: argparse.Action) -> str:
    return ENVIRONMENT + action.option_strings[0].lstrip("-").replace("-", "_").upper()


def _from_text(action: argparse.Action, value: str) -> Any:
    if isinstance(action, argparse.BooleanOptionalAction | argparse._StoreTrueAction):
        if value.lower() not in ("1", "0", "true", "false", "yes", "no"):
            raise ValueError(f"{_variable(action)}={value!r}: expected true or false")
        return value.lower() in ("1", "true", "yes")
    return value.split(",") if action.nargs == "+" or isinstance(action, argparse._AppendAction) else value


def _read_settings(path: Path) -> dict[str, Any]:
    """A file of settings. ValueError where it is none; FileNotFoundError."""
    text = path.read_text(encoding="utf-8")
    try:
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected names and values, got {type(settings).__name__}")
    return {str(name).replace("-", "_"): value for name, value in settings.items()}


def _words(parser: argparse.ArgumentParser, settings: Mapping[str, Any], where: str) -> list[str]:
    """Settings as words of a command line."""
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    by_flag = {_variable(action).removeprefix(ENVIRONMENT).lower(): action for action in actions.values()}
    words: list[str] = []
    for name, value in settings.items():
        action = by_flag.get(name) or actions.get(name)
        if action is None or name in ("config", "help"):
            raise ValueError(f"{where}: there is no setting {name!r}; `jaxcept serve --help` lists them")
        flag = action.option_strings[0]
        if isinstance(action, argparse.BooleanOptionalAction):
            words.append(action.option_strings[0] if value else action.option_strings[-1])
        elif isinstance(action, argparse._StoreTrueAction):
            words += [flag] if value else []
        elif isinstance(action, argparse._AppendAction):
            words += [word for item in (value if isinstance(value, list) else [value]) for word in (flag, str(item))]
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None:
            words += [f"{flag}={value}"]
    return words


def make_config(args: argparse.Namespace) -> ServeConfig:
    """The server that the flags ask for. ValueError names the flag at fault."""
    if args.model_path is not None and args.model is not None:
        raise ValueError("the model is given twice: as MODEL and as --model")
    model = args.model_path if args.model_path is not None else args.model
    from jaxcept_serve.cli import engine_options  # noqa: PLC0415 (the command line imports this module)

    engine = EngineConfig(model, **engine_options(args))
    return ServeConfig(
        engine=engine,
        options=make_options(args),
        hold=HoldOptions(
            ttl_s=_at_least(args.hold_ttl, 0, "--hold-ttl"),
            max_ttl_s=_at_least(args.max_hold_ttl, 0, "--max-hold-ttl"),
            max_held=_at_least(args.max_held, 0, "--max-held"),
            memory_bytes=int(_at_least(args.conversation_memory_mb, 0, "--conversation-memory-mb") * (1 << 20)),
            intercept_timeout_s=_at_least(args.intercept_timeout, 0.001, "--intercept-timeout"),
        ),
        tools=make_tools(args, model),
        model_names=tuple(args.served_model_name or ()),
        otlp_endpoint=args.otlp_traces_endpoint,
        host=args.host,
        port=args.port,
        grace_s=_at_least(args.grace_s, 0, "--grace-s"),
        log_format=args.log_format,
        log_level=args.uvicorn_log_level,
    )


def make_options(args: argparse.Namespace) -> ServerOptions:
    """The server's limits."""
    keys = [_api_key(text, number) for number, text in enumerate(args.api_key or (), 1)]
    # Any page that a browser shows can have its own name resolve to this machine, and then ask as if it were local.
    is_open_to_pages = not keys and args.host in LOOPBACK
    options = ServerOptions(
        api_keys=tuple(keys),
        salt_secret=(args.salt_secret or "").encode(),
        allowed_hosts=tuple(args.allowed_hosts) or (LOCAL_NAMES if is_open_to_pages else ()),
        cors_origins=tuple(args.allowed_origins),
        max_num_queued_reqs=args.max_num_queued_reqs or None,
    )
    names = (
        "max_body_bytes", "max_concurrent", "max_concurrent_per_key", "requests_per_s", "max_num_queued_tokens",
        "max_headers", "max_header_bytes", "max_tools", "max_schema_bytes",
    )  # fmt: skip
    return replace(options, **{name: getattr(args, name) for name in names})


def make_tools(args: argparse.Namespace, model: str | None) -> ToolFlags:
    """The tools that the server runs: those of the shipped model where nothing is said."""
    functions: Sequence[str] = [spec for spec in args.tools or () if spec != "none"]
    if args.tools is None and model is None and not args.mcp and not args.openapi:
        functions = [BUILT_IN_TOOLS]
    limits = replace(
        SERVER_LIMITS,
        timeout_s=args.tool_timeout,
        max_concurrency=args.tool_max_concurrency,
        breaker_failures=args.tool_breaker_failures,
        cache_ttl_s=args.tool_cache_ttl,
    )
    return ToolFlags(
        functions, args.mcp, args.openapi, args.allow_tools, args.tool_allow_host, args.tool_process, limits
    )


def _api_key(text: str, number: int) -> ApiKey:
    name, separator, key = text.partition("=")
    return ApiKey(name, key) if separator and name.isidentifier() else ApiKey(f"key-{number}", text)


def _at_least(value: Any, low: float, flag: str) -> Any:
    if not value >= low:
        raise ValueError(f"{flag} {value}: expected {low:g} or more")
    return value
