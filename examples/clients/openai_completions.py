"""The openai client, completions: a prompt as it stands, whole and streamed."""

import sys

from common import BASE_URL, MODEL
from openai import OpenAI

client = OpenAI(base_url=f"{BASE_URL}/v1", api_key="none")
whole = client.completions.create(model=MODEL, prompt="What is", max_tokens=12, temperature=0, logprobs=2)
text = whole.choices[0].text
pieces = client.completions.create(model=MODEL, prompt="What is", max_tokens=12, temperature=0, stream=True)
streamed = "".join(piece.choices[0].text for piece in pieces if piece.choices)
print(repr(text))
if text != streamed or len(whole.choices[0].logprobs.tokens) != whole.usage.completion_tokens:
    sys.exit(f"expected the same text streamed, and a logprob for each token; got {streamed!r}")
