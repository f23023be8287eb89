"""Log-probabilities in the forms of the OpenAI APIs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxcept.scheduler.plan import TokenLogprobs

TokenText = Callable[[int], str]


def chat_logprobs(token_ids: Sequence[int], entries: Sequence[TokenLogprobs], text: TokenText) -> dict[str, Any]:
    """As chat completions tell them."""

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        shown = text(token_id)
        return {"token": shown, "logprob": logprob, "bytes": list(shown.encode())}

    content = [
        {**token(token_id, entry.logprob), "top_logprobs": [token(other, value) for other, value in entry.top]}
        for token_id, entry in zip(token_ids, entries, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], text: TokenText, offset: int = 0
) -> dict[str, Any]:
    """As completions tell them; `offset` is where the first token begins in the text. The chosen token is among the
    top ones, however unlikely it was. None (of a prompt's first token) is null."""
    told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, entry in zip(token_ids, entries, strict=True):
        shown = text(token_id)
        told["tokens"].append(shown)
        told["text_offset"].append(offset)
        offset += len(shown)
        told["token_logprobs"].append(None if entry is None else entry.logprob)
        top = None if entry is None else {text(other): value for other, value in entry.top} | {shown: entry.logprob}
        told["top_logprobs"].append(top)
    return told


def prompt_logprobs(
    token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], text: TokenText
) -> list[dict[str, Any] | None]:
    """As vLLM tells them: for each prompt token, the candidates by id; None for the first."""

    def shown(token_id: int, entry: TokenLogprobs) -> dict[str, Any]:
        candidates = (*entry.top, (token_id, entry.logprob))
        return {str(other): {"logprob": value, "decoded_token": text(other)} for other, value in candidates}

    each = zip(token_ids, entries, strict=True)
    return [None if entry is None else shown(token_id, entry) for token_id, entry in each]
