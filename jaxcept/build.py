"""Puts one engine together from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from jaxcept.clock import MonotonicClock
from jaxcept.config import (
    EngineConfig,
    default_max_num_batched_tokens,
    default_max_num_seqs,
    on_cpu,
    use_compilation_cache,
)
from jaxcept.engine import Engine
from jaxcept.metrics import Ledger
from jaxcept.runner.memory import choose_num_blocks
from jaxcept.runner.runner import DeviceRunner, RunnerConfig
from jaxcept.scheduler.config import SchedulerConfig
from jaxcept.scheduler.params import SamplingParams
from jaxcept.scheduler.policies.discard import Discard
from jaxcept.scheduler.policies.preserve import Preserve
from jaxcept.scheduler.policy import Policy
from jaxcept.scheduler.scheduler import Scheduler
from jaxcept.session import InterceptOptions, Session
from jaxcept.text.folder import read_text_files
from jaxcept.text.stop import StopStrings
from jaxcept.text.stream import StreamDecoder
from jaxcept.text.tokenizer import Tokenizer
from jaxcept.tools.parsers import ToolCallParser, detect_parser, make_parser
from jaxcept.watcher import TextWatcher
from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.library import native_available
from jaxcept_models.config import read_config
from jaxcept_models.model import ARCHITECTURES, Model, load_model

Progress = Callable[[int, int, str], None]

DEFAULT_MAX_MODEL_LEN = 4096
_POLICIES: dict[str, Callable[[], Policy]] = {"preserve": Preserve, "discard": Discard}


def build_session(config: EngineConfig, progress: Progress) -> Session:
    """Loads the model, compiles, and connects everything. `progress(done, total, what)`.

    Raises CheckpointError or TokenizerError where the folder is wrong, ValueError where an option is.
    """
    use_compilation_cache(config.compilation_cache)
    tokenizer = load_tokenizer(config)
    parser_name = choose_parser(config, tokenizer)
    model = load_model(
        config.folder,
        dtype=config.dtype,  # type: ignore[arg-type]  # load_model names the allowed values in its error
        load_format=config.load_format,  # type: ignore[arg-type]
        implementation=choose_implementation(config),
        seed=config.seed,
        progress=lambda done, total: progress(done >> 20, total >> 20, "loading weights, MiB"),
    )
    runner = DeviceRunner(model, choose_sizes(config, model))
    runner.warm_up(lambda done, total, what: progress(done, total, f"compiling: {what}"))
    sizes = runner.config
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=sizes.num_blocks,
            block_size=sizes.block_size,
            max_num_seqs=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            max_model_len=sizes.max_model_len,
            vocab_size=model.config.vocab_size,
            enable_prefix_caching=config.enable_prefix_caching,
        ),
        _POLICIES[config.intercept_policy](),
    )
    clock = MonotonicClock()
    engine = Engine(scheduler, runner, clock, Ledger(runner.layout.block_bytes))
    return Session(engine, tokenizer, watcher_factory(tokenizer, parser_name), clock, config.seed)


def load_tokenizer(config: EngineConfig) -> Tokenizer:
    """The folder's tokenizer, with the user's chat template (a file, or the template itself) if there is one."""
    files = read_text_files(config.tokenizer if config.tokenizer is not None else config.folder)
    if config.chat_template is not None:
        path = Path(config.chat_template)
        is_file = len(config.chat_template) < 4096 and "{" not in config.chat_template
        source = path.read_text(encoding="utf-8") if is_file else config.chat_template
        files = replace(files, chat_template=source, tool_template=None)
    return Tokenizer(files)


def choose_parser(config: EngineConfig, tokenizer: Tokenizer) -> str | None:
    """The name of the tool-call parser, "auto" read off the chat template; None where it shows no format."""
    if config.tool_call_parser != "auto":
        make_parser(config.tool_call_parser)
        return config.tool_call_parser
    return detect_parser(tokenizer.chat_template.source) if tokenizer.chat_template is not None else None


def choose_implementation(config: EngineConfig) -> Implementation:
    """The CPU's own kernels where they can be built and the dtype is theirs, otherwise XLA."""
    if config.implementation != "auto":
        return Implementation(config.implementation)
    is_native = on_cpu() and config.dtype in ("auto", "float32") and native_available()
    return Implementation.NATIVE if is_native else Implementation.XLA


def choose_sizes(config: EngineConfig, model: Model) -> RunnerConfig:
    """The sizes that are compiled in; what the user left open follows from the model and the device."""
    limit = model.config.max_position_embeddings
    max_model_len = config.max_model_len or min(limit, DEFAULT_MAX_MODEL_LEN)
    max_num_seqs = config.max_num_seqs or default_max_num_seqs()
    budget = config.max_num_batched_tokens or default_max_num_batched_tokens()
    num_blocks = config.num_blocks or choose_num_blocks(
        model, config.block_size, max_num_seqs, max_model_len, budget, config.memory_utilization
    )
    return RunnerConfig(num_blocks, config.block_size, max_num_seqs, budget, max_model_len)


def architectures() -> tuple[str, ...]:
    """Architectures of config.json that can be loaded."""
    return tuple(ARCHITECTURES)


def describe_model(folder: str | Path) -> dict[str, str]:
    """What a model folder's config.json says, field by field. Raises CheckpointError."""
    config = read_config(folder)
    return {field.name: str(getattr(config, field.name)) for field in fields(config)}


def watcher_factory(
    tokenizer: Tokenizer, parser_name: str | None
) -> Callable[[SamplingParams, InterceptOptions, bool], TextWatcher]:
    """Makes a sequence's watcher: (params, options, whether it has tools)."""

    def make(params: SamplingParams, options: InterceptOptions, has_tools: bool) -> TextWatcher:
        parser: ToolCallParser | None = None
        if has_tools:
            if parser_name is None:
                raise ValueError(
                    "tools are given, but the chat template shows no known format of tool calls; set tool_call_parser"
                )
            parser = make_parser(parser_name)
        keep = tokenizer.ids_of(parser.markers) if parser is not None else ()
        return TextWatcher(
            StreamDecoder(tokenizer, params.skip_special_tokens, keep=keep, continues=True),
            StopStrings(params.stop, params.include_stop_str_in_output),
            parser,
            options.trigger,
            options.strings,
            params.min_tokens,
        )

    return make
