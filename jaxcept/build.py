"""Puts one engine together from its configuration."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import jax

from jaxcept.clock import MonotonicClock
from jaxcept.config import (
    GIB,
    EngineConfig,
    cache_folder,
    default_host_pool_bytes,
    default_max_num_batched_tokens,
    default_max_num_seqs,
    on_cpu,
    read_speculation,
    use_compilation_cache,
)
from jaxcept.constraint import ConstraintMaker, ToolMode
from jaxcept.engine import Engine
from jaxcept.hosts import assemble, follow, heed_sigterm, lead
from jaxcept.metrics import Ledger
from jaxcept.runner.memory import choose_num_blocks
from jaxcept.runner.profile import profile
from jaxcept.runner.runner import DeviceRunner, RunnerConfig
from jaxcept.scheduler.config import SchedulerConfig
from jaxcept.scheduler.costs import CostModel
from jaxcept.scheduler.durations import make_estimator
from jaxcept.scheduler.orders import make_order
from jaxcept.scheduler.params import SamplingParams
from jaxcept.scheduler.policies.catalog import SWAPPING, make_policy
from jaxcept.scheduler.refined_costs import RefinedCosts
from jaxcept.scheduler.scheduler import Scheduler
from jaxcept.scheduler.speculation import Speculation
from jaxcept.session import InterceptOptions, Session
from jaxcept.text.folder import read_text_files
from jaxcept.text.grammar import GrammarCompiler
from jaxcept.text.reasoning import MARKERS, detect_reasoning, make_thoughts
from jaxcept.text.stop import StopStrings
from jaxcept.text.stream import StreamDecoder
from jaxcept.text.tokenizer import Tokenizer
from jaxcept.tools.parsers import ToolCallParser, detect_parser, make_parser
from jaxcept.tools.toolbox import Toolbox
from jaxcept.watcher import Hold, TextWatcher, Thinking
from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.library import native_available
from jaxcept_models.config import read_config
from jaxcept_models.model import ARCHITECTURES, Model, load_model
from jaxcept_models.saving import convert_checkpoint
from jaxcept_models.sharding import make_mesh

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]

DEFAULT_MAX_MODEL_LEN = 4096


def build_session(config: EngineConfig, progress: Progress) -> Session:
    """Loads the model, compiles, and connects everything. `progress(done, total, what)`.

    Raises CheckpointError or TokenizerError where the folder is wrong, ValueError where an option is. On several hosts
    this is the first one's part, and HostLostError says that another one does not come.
    """
    use_compilation_cache(config.compilation_cache)
    tokenizer = load_tokenizer(config)
    parser_name, reasoning = choose_parser(config, tokenizer), choose_reasoning(config, tokenizer)
    runner = build_runner(config, progress)
    costs = RefinedCosts(choose_costs(config, runner, progress))
    engine = build_engine(config, runner, costs)
    watcher = watcher_factory(tokenizer, parser_name, constraint_maker(tokenizer, parser_name), reasoning)
    return Session(engine, tokenizer, watcher, engine.clock, config.seed)


def build_runner(config: EngineConfig, progress: Progress) -> DeviceRunner:
    """The device's part: the model loaded, everything compiled, host memory pinned."""
    crew = assemble(config) if config.hosts is not None else None
    model = load_configured(config, progress)
    sizes = choose_sizes(config, model)
    runner = DeviceRunner(model, sizes) if crew is None else lead(crew, model, sizes)
    runner.warm_up(lambda done, total, what: progress(done, total, f"compiling: {what}"))
    return runner


def obey_host(config: EngineConfig, progress: Progress, grace_s: float = 0.0) -> None:
    """The part of every host but the first, from the loading of the model to the end, in the main thread.

    `grace_s` is what the first host has to drain after SIGTERM. Errors as build_session.
    """
    crew = assemble(config)
    heed_sigterm(crew, grace_s)
    follow(crew, lambda: load_configured(config, progress))


def load_configured(config: EngineConfig, progress: Progress) -> Model:
    """The model that a configuration names, on its devices. Errors as load_model."""
    sizes = config.tensor_parallel_size, config.data_parallel_size
    return load_model(
        config.folder,
        mesh=make_mesh(*sizes) if config.num_devices > 1 else None,
        dtype=config.dtype,  # type: ignore[arg-type]  # load_model names the allowed values in its error
        load_format=config.load_format,  # type: ignore[arg-type]
        implementation=choose_implementation(config),
        seed=config.seed,
        kv_cache_dtype=config.kv_cache_dtype,  # type: ignore[arg-type]
        progress=lambda done, total: progress(done >> 20, total >> 20, "loading weights, MiB"),
    )


def build_engine(config: EngineConfig, runner: DeviceRunner, costs: RefinedCosts) -> Engine:
    """One scheduler, with the policy, order and estimator that the configuration names, and its loop."""
    sizes = runner.config
    limits = SchedulerConfig(
        num_blocks=sizes.num_blocks,
        block_size=sizes.block_size,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=sizes.max_model_len,
        vocab_size=runner.model.config.vocab_size,
        enable_prefix_caching=config.enable_prefix_caching,
        num_host_blocks=sizes.num_host_blocks,
        return_head_start_s=config.return_head_start_s,
    )
    scheduler = Scheduler(
        limits,
        make_policy(config.intercept_policy, costs, sizes.block_size),
        make_estimator(config.duration_estimator),
        make_order(config.queue_order),
        make_speculation(config, costs),
    )
    return Engine(scheduler, runner, MonotonicClock(), Ledger(runner.layout.block_bytes), costs=costs)


def make_speculation(config: EngineConfig, costs: RefinedCosts) -> Speculation | None:
    """Who guesses tokens, where the configuration asks for it."""
    chosen = read_speculation(config.speculative_config)
    return Speculation(chosen, costs) if chosen is not None else None


def profile_model(config: EngineConfig, progress: Progress, brief: bool = False) -> CostModel:
    """Loads a model and measures this device with it: what `jaxcept profile` does."""
    use_compilation_cache(config.compilation_cache)
    return profile(build_runner(config, progress), progress, model=config.model_name, brief=brief)


def convert_model(source: Path, folder: Path, progress: Progress) -> None:
    """Writes a Hugging Face folder as a checkpoint for any number of devices: what `jaxcept convert` does.

    CheckpointError or ValueError where one of the folders is wrong.
    """
    convert_checkpoint(
        source, folder, lambda done, total: progress(done >> 20, total >> 20, "reading" if done < total else "writing")
    )


def choose_costs(config: EngineConfig, runner: DeviceRunner, progress: Progress) -> CostModel:
    """The cost model of the user's file, or of an earlier start with this model on this device, or measured now.

    ValueError or FileNotFoundError where the user's file is wrong.
    """
    if config.cost_model is not None:
        return CostModel.load(config.cost_model)
    path = cache_folder() / "costs" / f"{fingerprint(runner)}.json"
    try:
        return CostModel.load(path)
    except (OSError, ValueError):
        costs = profile(runner, progress, model=config.model_name, brief=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        costs.save(path)
    except OSError as error:
        logger.warning("the cost model cannot be kept in %s: %s", path, error)
    return costs


def fingerprint(runner: DeviceRunner) -> str:
    """Names what a profile depends on: device, model, sizes, version of JAX."""
    device = jax.devices()[0]
    model = runner.model
    mesh = None if model.placement is None else dict(model.placement.mesh.shape)
    dtypes = (model.dtype, model.kv_cache_dtype)
    parts = (device.device_kind, jax.__version__, model.config, dtypes, model.implementation, runner.config, mesh)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


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


def choose_reasoning(config: EngineConfig, tokenizer: Tokenizer) -> str | None:
    """The name of the format of thoughts, "auto" read off the chat template; None where they are not told apart."""
    if config.reasoning_parser == "none":
        return None
    if config.reasoning_parser != "auto":
        make_thoughts(config.reasoning_parser)
        return config.reasoning_parser
    return detect_reasoning(tokenizer.chat_template.source) if tokenizer.chat_template is not None else None


def choose_implementation(config: EngineConfig) -> Implementation:
    """On a CPU its own kernels, where they can be built and the dtype is theirs; on a GPU Pallas; otherwise XLA.

    The CPU's own kernels take all its cores, so several virtual devices of a CPU compute by XLA.
    """
    if config.implementation != "auto":
        return Implementation(config.implementation)
    if jax.default_backend() == "gpu":
        return Implementation.PALLAS
    is_native = on_cpu() and config.num_devices == 1 and config.dtype in ("auto", "float32") and native_available()
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
    num_host_blocks = 0
    if config.intercept_policy in SWAPPING:
        block_bytes = model.kv_layout(num_blocks, config.block_size).block_bytes
        wanted = config.host_pool_gb
        num_bytes = default_host_pool_bytes(num_blocks * block_bytes) if wanted is None else int(wanted * GIB)
        num_host_blocks = num_bytes // block_bytes
    return RunnerConfig(num_blocks, config.block_size, max_num_seqs, budget, max_model_len, num_host_blocks)


def architectures() -> tuple[str, ...]:
    """Architectures of config.json that can be loaded."""
    return tuple(ARCHITECTURES)


def describe_model(folder: str | Path) -> dict[str, str]:
    """What a model folder's config.json says, field by field. Raises CheckpointError."""
    config = read_config(folder)
    return {field.name: str(getattr(config, field.name)) for field in fields(config)}


def constraint_maker(tokenizer: Tokenizer, parser_name: str | None) -> ConstraintMaker:
    """What masks are made by, for the markers of this format of tool calls."""
    markers = tokenizer.ids_of(make_parser(parser_name).markers) if parser_name is not None else ()
    return ConstraintMaker(GrammarCompiler(tokenizer, markers), parser_name, tokenizer.token_id)


def watcher_factory(
    tokenizer: Tokenizer,
    parser_name: str | None,
    constraints: ConstraintMaker | None = None,
    reasoning: str | None = None,
) -> Callable[[SamplingParams, InterceptOptions, Toolbox | None], TextWatcher]:
    """Makes a sequence's watcher: (params, options, its tools). Without `constraints` nothing binds its text, without
    `reasoning` thoughts are text like any other."""

    def make(params: SamplingParams, options: InterceptOptions, toolbox: Toolbox | None) -> TextWatcher:
        parser: ToolCallParser | None = None
        choice = options.tool_choice
        if toolbox is not None and choice.mode is not ToolMode.NONE:
            if parser_name is None:
                raise ValueError(
                    "tools are given, but the chat template shows no known format of tool calls; set tool_call_parser"
                )
            parser = make_parser(parser_name)
        outside = frozenset(made.name for made in toolbox if made.function is None) if toolbox is not None else ()
        markers = (*(parser.markers if parser is not None else ()), *(MARKERS if reasoning is not None else ()))
        keep = tokenizer.ids_of(markers)
        return TextWatcher(
            StreamDecoder(tokenizer, params.skip_special_tokens, keep=keep, continues=True),
            StopStrings(params.stop, params.include_stop_str_in_output),
            parser,
            options.trigger,
            options.strings,
            params.min_tokens,
            Hold(options.hold_s, frozenset(outside)) if options.hold_s is not None else None,
            constraints.make(params.structured, choice, toolbox) if constraints is not None else None,
            Thinking(make_thoughts(reasoning), *map(tokenizer.token_id, MARKERS)) if reasoning is not None else None,
        )

    return make
