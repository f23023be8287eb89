"""What clients hand in, checked before it touches any state."""

from __future__ import annotations

from jaxcept.scheduler.config import SchedulerConfig
from jaxcept.scheduler.params import SamplingParams

MAX_TOKEN_ID = 2**31 - 1  # token ids travel as int32


class StateError(ValueError):
    """The sequence is not in the state that the call needs."""


def check_ids(name: str, token_ids: tuple[int, ...], config: SchedulerConfig) -> None:
    """ValueError unless all are integers of the vocabulary."""
    for token_id in token_ids:
        if type(token_id) is not int:
            raise ValueError(f"{name} holds {token_id!r}: expected integers")
    limit = MAX_TOKEN_ID if config.vocab_size is None else config.vocab_size - 1
    for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
        if not 0 <= token_id <= limit:
            raise ValueError(f"{name} has id {token_id}: expected 0 to {limit}")


def check_params(params: SamplingParams, config: SchedulerConfig) -> None:
    """ValueError unless the tokens that the parameters name are of the vocabulary."""
    check_ids("logit_bias", tuple(params.logit_bias or ()), config)
    check_ids("stop_token_ids", tuple(params.stop_token_ids), config)


def check_prompt(prompt_ids: tuple[int, ...], config: SchedulerConfig) -> None:
    """ValueError unless the prompt can be served: not empty, with room for one more token in model and pool."""
    if not prompt_ids:
        raise ValueError("prompt_ids is empty: expected at least one token id")
    check_ids("prompt_ids", prompt_ids, config)
    num_prompt = len(prompt_ids)
    if num_prompt >= config.max_model_len:
        raise ValueError(
            f"prompt_ids has {num_prompt} ids: expected at most {config.max_model_len - 1}, so that one token can"
            f" follow within max_model_len={config.max_model_len}; shorten the prompt"
        )
    if num_prompt >= config.max_len:
        raise ValueError(
            f"prompt_ids has {num_prompt} ids and needs {config.blocks_for(num_prompt + 1)} KV blocks of"
            f" {config.block_size} tokens: the pool has {config.num_blocks}; shorten the prompt or enlarge the pool"
        )
