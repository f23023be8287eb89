"""One host of two, for test_hosts: HOST_ID PORT FOLDER COSTS CACHE. Host 0 prints its tokens, how many blocks were
swapped out and how many programs compiled meanwhile, and then generates until it is ended."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "").replace("device_count=8", "device_count=1")

from jaxcept import LLM, InterceptOptions, SamplingParams
from jaxcept.build import obey_host
from jaxcept.config import EngineConfig, Hosts
from jaxcept.runner.compiles import CompileCounter
from jaxcept.scheduler.params import ScriptedTrigger

OPTIONS = {
    "max_num_seqs": 1,
    "max_num_batched_tokens": 4,
    "max_model_len": 512,
    "num_blocks": 64,
    "intercept_policy": "swap",
    "implementation": "xla",
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11] * 5, [30, 31, 32, 33]]


def tokens(llm: LLM) -> list[list[int]]:
    """Of two sequences that are intercepted twice, and swapped out meanwhile."""
    script = (ScriptedTrigger(5), ScriptedTrigger(4))
    intercept = InterceptOptions(script=script, handler=lambda text: "42")
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), intercept=intercept)
    return [list(output.outputs[0].token_ids) for output in outputs]


def main(host_id: int, port: int, folder: Path, costs: Path, cache: Path) -> None:
    hosts = Hosts(f"127.0.0.1:{port}", 2, host_id)
    options = OPTIONS | {"tensor_parallel_size": 2, "cost_model": costs, "hosts": hosts, "compilation_cache": cache}
    if host_id:
        obey_host(EngineConfig(folder, **options), lambda done, total, what: None)
        return
    llm = LLM(folder, progress=False, **options)
    compiles = CompileCounter()
    print(json.dumps([tokens(llm), llm.get_metrics()["swapped_out_blocks"], compiles.count]), flush=True)
    if sys.stdin.readline().strip() == "go on":
        while True:
            llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
            print("again", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *map(Path, sys.argv[3:6]))
