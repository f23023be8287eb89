"""A small model calls tools while other conversations share its batch, and goes on with the answers.

    python examples/demo.py [--policy NAME …]

Six conversations run side by side. When the model calls a tool, its sequence is INTERCEPTED: the others go on, and
when the tool answers the sequence goes on from the very token ids that it has. The tools are slowed down here, as real
ones are slow, so that interceptions overlap. The exit status is 1 if a final answer is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console

from jaxcept import LLM, RequestOutput, SamplingParams, tool
from jaxcept.scheduler.policies.catalog import POLICIES
from jaxcept.tools import builtin

SHOWN = ("min-waste", "preserve", "swap", "discard")


@tool
def calculator(expression: str) -> str:
    """Work out an arithmetic expression.

    Args:
        expression: such as "(12+30)*4"
    """
    time.sleep(0.15)
    return builtin.calculator(expression)


@tool
def lookup(entity: str, attribute: str) -> str:
    """Look up a fact about a country, a mountain or a river in a small table.

    Args:
        entity: such as "France"
        attribute: such as "capital"
    """
    time.sleep(0.4)
    return builtin.lookup(entity, attribute)


@tool
def convert(value: float, unit_from: str, unit_to: str) -> str:
    """Convert a value between units.

    Args:
        value: how much
        unit_from: such as "km"
        unit_to: such as "mi"
    """
    time.sleep(0.25)
    return builtin.convert(value, unit_from, unit_to)


# Questions, and what a right answer must hold.
CONVERSATIONS = (
    ("What is 37 * 91?", "3367"),
    ("What is the capital of France?", "Paris"),
    ("Convert 12 km to m.", "12000"),
    ("What is (48 + 17) * 6?", "390"),
    ("What is the capital of Japan?", "Tokyo"),
    ("Hello!", ""),
)


def show_stream(console: Console, llm: LLM, params: SamplingParams) -> list[RequestOutput]:
    """Runs the conversations, printing what happens as it happens."""
    messages = [[{"role": "user", "content": question}] for question, _ in CONVERSATIONS]
    outputs: dict[str, RequestOutput] = {}
    start = time.perf_counter()
    for delta in llm.chat_stream(messages, params, tools=[calculator, lookup, convert]):
        at = f"{time.perf_counter() - start:6.2f} s  [{int(delta.request_id) + 1}]"
        if delta.kind == "intercepted":
            console.print(f"{at} intercepted: calls {delta.trigger}; the others go on", highlight=False, markup=False)
        elif delta.kind == "returned":
            console.print(f"{at} resumed with {len(delta.token_ids)} returned tokens", highlight=False, markup=False)
        if delta.output is not None:
            outputs[delta.request_id] = delta.output
            console.print(f"{at} done: {delta.output.outputs[0].answer}", highlight=False, markup=False)
    return [outputs[str(index)] for index in range(len(CONVERSATIONS))]


def show_interceptions(console: Console, outputs: list[RequestOutput]) -> None:
    """One line per interception."""
    for number, output in enumerate(outputs, start=1):
        for each in output.interceptions:
            calls = "; ".join(f"{c.name}({', '.join(map(str, c.arguments.values()))}) = {c.result}" for c in each.calls)
            console.print(
                f"[{number}] {calls}: lasted {each.duration_s:.2f} s, context of {each.context_tokens} tokens "
                f"{each.residency}, {each.num_recomputed} tokens recomputed",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=POLICIES, action="append", help="(default: some in turn)")
    args = parser.parse_args()
    console = Console()
    params = SamplingParams(temperature=0, max_tokens=200)
    is_right, ids = True, []
    for policy in args.policy or SHOWN:
        # Without the prefix cache, so that "discard" shows what it costs.
        llm = LLM(intercept_policy=policy, max_num_seqs=8, max_model_len=1024, max_num_batched_tokens=256,
                  enable_prefix_caching=policy != "discard")  # fmt: skip
        console.rule(f"policy: {policy}")
        outputs = show_stream(console, llm, params)
        show_interceptions(console, outputs)
        ids.append([output.outputs[0].token_ids for output in outputs])
        for (question, expected), output in zip(CONVERSATIONS, outputs, strict=True):
            if expected.replace(",", "") not in output.outputs[0].answer.replace(",", ""):
                is_right = False
                console.print(f"WRONG: {question} → {output.outputs[0].answer!r}, expected {expected!r}", style="red")
    if is_right:
        console.print(f"All {len(CONVERSATIONS)} conversations ended with the right answer.")
    if len(ids) > 1:
        equal = all(each == ids[0] for each in ids)
        console.print(f"The model's token ids are {'equal' if equal else 'NOT equal'} under every policy.")
        is_right &= equal
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
