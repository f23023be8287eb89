"""Sizes that the tests of the shipped model share: its programs are compiled once for all of them."""

from typing import Any

MAX_LEN = 512
SHIPPED: dict[str, Any] = {
    "max_model_len": MAX_LEN,
    "max_num_seqs": 4,
    "num_blocks": 160,
    "max_num_batched_tokens": 64,
    "compilation_cache": "",
}
