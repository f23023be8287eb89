"""The session around a runner that speaks from a script: tools, answers, text, limits, failures."""

from __future__ import annotations

import re
import threading
import time
from collections import deque

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxcept.answers import CUT_NOTE, encode_answers
from jaxcept.build import watcher_factory
from jaxcept.clock import MonotonicClock
from jaxcept.engine import Engine
from jaxcept.metrics import Ledger
from jaxcept.scheduler.config import SchedulerConfig
from jaxcept.scheduler.params import SamplingParams
from jaxcept.scheduler.plan import StepResult
from jaxcept.scheduler.policies.discard import Discard
from jaxcept.scheduler.scheduler import Scheduler, StateError
from jaxcept.session import InterceptOptions, Session
from jaxcept.text.folder import TextFiles
from jaxcept.text.tokenizer import Tokenizer
from jaxcept.tools.calls import ToolCall
from jaxcept.tools.definition import tool
from jaxcept.tools.toolbox import Toolbox

CHATML = """{%- if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{%- for m in messages %}
{%- if m.role == "tool" %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content or "" }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def call_text(tool_name, **arguments):
    pairs = ", ".join(f'"{key}": "{value}"' for key, value in arguments.items())
    return f'<tool_call>\n{{"name": "{tool_name}", "arguments": {{{pairs}}}}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(TextFiles(backend, {"eos_token": "<|im_end|>"}, chat_template=CHATML))


class ScriptRunner:
    """Draws the ids that a script lays down for each sequence, in order, whatever the step; checks what it is given."""

    def __init__(self, scripts):
        self.scripts = scripts  # by seq_id
        self.row_tokens = {}  # by seq_id, the ids of its RowSetups
        self.plans = []
        self._seq_of_row = {}
        self._positions = {}
        self._results = deque()

    def submit(self, plan):
        self.plans.append(plan)
        for setup in plan.rows:
            self.row_tokens.setdefault(setup.seq_id, []).append(setup.token_ids)
            self._positions[setup.seq_id] = sum(stop - start for start, stop in setup.output_spans)
        ids = []
        for seq_id in plan.sampling_seq_ids:
            script, at = self.scripts[seq_id], self._positions[seq_id]
            ids.append(script[at] if at < len(script) else 0)
            self._positions[seq_id] = at + 1
        self._results.append(StepResult(plan.step_id, tuple(ids), {}, {}))

    def collect(self):
        return self._results.popleft()


def make_session(tokenizer, *texts, policy=None, reasoning=None, **config):
    scripts = {i: tokenizer.encode(text, add_special_tokens=False) for i, text in enumerate(texts)}
    sizes = {"num_blocks": 400, "block_size": 8, "max_model_len": 1024} | config
    scheduler = Scheduler(SchedulerConfig(**sizes), policy or Discard())
    runner = ScriptRunner(scripts)
    engine = Engine(scheduler, runner, MonotonicClock(), Ledger(1))
    watcher = watcher_factory(tokenizer, "hermes", reasoning=reasoning)
    return Session(engine, tokenizer, watcher, MonotonicClock())


def run(session, on_delta=None, limit_s=20.0):
    """Steps until everything has finished; (all deltas, outputs by request)."""
    deltas, outputs, end = [], {}, time.monotonic() + limit_s
    while session.has_work:
        assert time.monotonic() < end, "the session does not come to an end"
        idle_s = session.idle_s()
        if idle_s:
            session.wait(min(idle_s, 0.05))
        for delta in session.step():
            deltas.append(delta)
            if on_delta is not None:
                on_delta(delta)
            if delta.output is not None:
                outputs[delta.request_id] = delta.output
        session.engine.scheduler.check()
    return deltas, outputs


def chat(session, question, toolbox, request_id="r", options=None, **params):
    ids = session.tokenizer.encode_chat([{"role": "user", "content": question}], toolbox.schemas())
    session.add(ids, SamplingParams(**{"temperature": 0, "max_tokens": 400} | params), request_id=request_id,
                toolbox=toolbox, options=options)  # fmt: skip


@tool
def shout(word: str) -> str:
    """Say it loudly."""
    return word.upper()


@tool
def broken(word: str) -> str:
    """Never works."""
    raise KeyError(word)


def test_each_turn_may_begin_with_a_thought(tokenizer):
    call = call_text("shout", word="hi")
    script = f"<think>\n{call}?\n</think>\n\n{call}<|im_end|><think>HI, then</think>It is HI.<|im_end|>"
    session = make_session(tokenizer, script, reasoning="qwen3")
    with Toolbox([shout]) as toolbox:
        chat(session, "say hi", toolbox)
        _, outputs = run(session)
    (output,) = outputs["r"].outputs
    assert [len(each.calls) for each in output.interceptions] == [1], "a call in a thought is none"
    assert (output.reasoning, output.answer) == ("HI, then", "It is HI.")
    assert "<think>" in output.text, "nothing that was generated is left out"
    session = make_session(tokenizer, "<think>hm</think>3<|im_end|>")
    session.add("x", SamplingParams(max_tokens=40), request_id="r")
    (output,) = run(session)[1]["r"].outputs
    assert (output.reasoning, output.answer) == ("", "<think>hm</think>3"), "nobody asked for thoughts"


def test_a_call_runs_and_the_sequence_goes_on_from_its_own_ids(tokenizer):
    call = call_text("shout", word="hi")
    session = make_session(tokenizer, f"Let me.\n{call}<|im_end|>It is HI, naïvely ☃.<|im_end|>")
    with Toolbox([shout]) as toolbox:
        chat(session, "say hi", toolbox)
        deltas, outputs = run(session)
    completion = outputs["r"].outputs[0]
    assert completion.answer == "It is HI, naïvely ☃."
    assert completion.text == f"Let me.\n{call}It is HI, naïvely ☃."
    assert completion.finish_reason == "stop"
    (record,) = completion.interceptions
    assert (record.calls[0].name, record.calls[0].arguments, record.calls[0].result) == ("shout", {"word": "hi"}, "HI")
    assert record.residency == "cached" and record.outcome == "returned" and record.num_recomputed > 0
    # What was sent is what the sequence holds, and the device was given back the very ids that it had drawn.
    first, second = session.engine.runner.row_tokens[0]
    generated = tokenizer.encode(f"Let me.\n{call}<|im_end|>", add_special_tokens=False)
    returned = "\n<|im_start|>user\n<tool_response>\nHI\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert second == (*first, *generated, *tokenizer.encode(returned, add_special_tokens=False))
    assert "".join(d.text for d in deltas if d.kind != "returned") == completion.text
    assert [d.kind for d in deltas if d.kind in ("intercepted", "returned", "finished")] == [
        "intercepted", "returned", "finished"]  # fmt: skip
    assert [s.kind for s in completion.segments] == ["generated", "returned", "generated"]


def test_two_calls_of_a_turn_run_side_by_side(tokenizer):
    barrier = threading.Barrier(2, timeout=10)

    @tool
    def meet(name: str) -> str:
        """Waits for the other call."""
        barrier.wait()
        return f"{name} was there"

    calls = f"{call_text('meet', name='a')}\n{call_text('meet', name='b')}"
    session = make_session(tokenizer, f"{calls}<|im_end|>Both.<|im_end|>")
    with Toolbox([meet]) as toolbox:
        chat(session, "meet", toolbox)
        _, outputs = run(session)
    (record,) = outputs["r"].interceptions
    assert [call.result for call in record.calls] == ["a was there", "b was there"]
    assert outputs["r"].outputs[0].answer == "Both."


def test_trigger_call_stops_in_the_middle_of_the_turn(tokenizer):
    script = f"{call_text('shout', word='x')}Done.<|im_end|>"
    session = make_session(tokenizer, script)
    with Toolbox([shout]) as toolbox:
        chat(session, "x", toolbox, options=InterceptOptions(trigger="call"))
        _, outputs = run(session)
    assert outputs["r"].outputs[0].answer == "Done."
    returned = next(s for s in outputs["r"].outputs[0].segments if s.kind == "returned")
    assert tokenizer.decode(returned.token_ids, skip_special_tokens=False).startswith("<|im_end|>\n<|im_start|>user")


def test_others_go_on_while_one_waits(tokenizer):
    release = threading.Event()

    @tool
    def slow(word: str) -> str:
        """Waits until it is told."""
        assert release.wait(10)
        return word

    session = make_session(tokenizer, f"{call_text('slow', word='x')}<|im_end|>Late.<|im_end|>", "Early.<|im_end|>")
    finished = []

    def watch(delta):
        if delta.kind == "finished":
            finished.append(delta.request_id)
            release.set()

    with Toolbox([slow]) as toolbox:
        chat(session, "slow", toolbox, "waits")
        chat(session, "plain", toolbox, "goes on")
        _, outputs = run(session, watch)
    assert finished == ["goes on", "waits"]
    assert outputs["waits"].outputs[0].answer == "Late."


@pytest.mark.parametrize("name", ["broken", "missing"])
def test_the_model_is_told_of_a_failure_or_the_completion_fails(tokenizer, name):
    script = f"{call_text(name, word='x')}<|im_end|>Sorry.<|im_end|>"
    with Toolbox([broken]) as toolbox:
        session = make_session(tokenizer, script)
        chat(session, "x", toolbox)
        _, outputs = run(session)
        (record,) = outputs["r"].interceptions
        assert record.calls[0].is_error and record.calls[0].result.startswith("error")
        assert outputs["r"].outputs[0].answer == "Sorry."

        session = make_session(tokenizer, script)
        chat(session, "x", toolbox, options=InterceptOptions(on_failure="fail"))
        _, outputs = run(session)
    assert outputs["r"].outputs[0].finish_reason == "tool_failed"


def test_a_tool_that_hangs_is_given_up(tokenizer):
    release = threading.Event()

    @tool
    def hang(word: str) -> str:
        """Hangs."""
        release.wait(30)
        return word

    session = make_session(tokenizer, f"{call_text('hang', word='x')}<|im_end|>Too slow.<|im_end|>")
    with Toolbox([hang]) as toolbox:
        chat(session, "x", toolbox, options=InterceptOptions(timeout_s=0.2))
        _, outputs = run(session)
        release.set()
    (record,) = outputs["r"].interceptions
    assert "0.2 s" in record.calls[0].result and record.outcome == "failed"
    assert outputs["r"].outputs[0].answer == "Too slow."


def test_a_long_answer_is_cut_to_what_fits(tokenizer):
    @tool
    def novel(word: str) -> str:
        """Long."""
        return word * 100_000

    session = make_session(tokenizer, f"{call_text('novel', word='ab')}<|im_end|>Long.<|im_end|>")
    with Toolbox([novel]) as toolbox:
        chat(session, "x", toolbox, options=InterceptOptions(max_returned_tokens=200))
        _, outputs = run(session)
    (record,) = outputs["r"].interceptions
    assert 150 < record.num_returned <= 200
    assert "cut to fit" in next(s.text for s in outputs["r"].outputs[0].segments if s.kind == "returned")
    assert outputs["r"].outputs[0].answer == "Long."


def returned_texts(outputs):
    text = next(s.text for s in outputs["r"].outputs[0].segments if s.kind == "returned")
    return re.findall(r"<tool_response>\n(.*?)\n</tool_response>", text, re.S)


@pytest.mark.parametrize("count", [2, 9])
def test_long_answers_of_one_turn_share_the_room_and_say_that_they_are_cut(tokenizer, count):
    @tool
    def novel(word: str) -> str:
        """Long, but for one word."""
        return word if word == "short" else word * 50_000

    words = ["short", *(f"w{i}" for i in range(count))]
    script = "".join(call_text("novel", word=w) for w in words) + "<|im_end|>Long.<|im_end|>"
    session = make_session(tokenizer, script, max_model_len=3000)
    with Toolbox([novel]) as toolbox:
        chat(session, "x", toolbox, options=InterceptOptions(max_returned_tokens=800), max_tokens=2000)
        _, outputs = run(session)
    short, *long = returned_texts(outputs)
    assert short == "short" and len(long) == count, "a short answer stays whole"
    assert all(text.endswith(CUT_NOTE) for text in long)
    assert [text[:2] for text in long] == words[1:] or count > 5
    assert max(map(len, long)) - min(map(len, long)) <= 1, "the others are cut alike"
    assert 700 < outputs["r"].interceptions[0].num_returned <= 800
    assert outputs["r"].outputs[0].answer == "Long."


def test_answers_are_cut_by_what_fits_alone(tokenizer):
    calls = [ToolCall(f"call0000{i}", "f", {}) for i in range(3)]

    def parts(room, *texts):
        ids = encode_answers(tokenizer, calls[: len(texts)], texts, ended_turn=True, tools=[], room=room)
        assert len(ids) <= room
        text = tokenizer.decode(ids, skip_special_tokens=False)
        return re.findall(r"<tool_response>\n(.*?)\n</tool_response>", text, re.S)

    assert parts(400, "a" * 100, "b") == ["a" * 100, "b"]
    assert parts(300, "a" * 10**6, "", "b" * 10**6)[1] == ""
    whole, one, other = parts(320, "a" * 60, "b" * 100, "c" * 10**6)
    assert whole == "a" * 60 and one.endswith(CUT_NOTE) and other.endswith(CUT_NOTE) and len(one) == len(other)
    assert parts(300, *["☃" * 5000] * 3)[0].endswith(CUT_NOTE)
    frame = len(encode_answers(tokenizer, calls, [""] * 3, ended_turn=True, tools=[], room=1000))
    note = len(tokenizer.encode(CUT_NOTE, add_special_tokens=False))
    assert parts(frame + 3 * note, *["x" * 10**6] * 3) == [CUT_NOTE] * 3, "cut away whole, they say so still"
    for room in (frame + 3 * note - 1, 0, -5):
        with pytest.raises(ValueError, match="has room for"):
            parts(room, *["x" * 10**6] * 3)


def test_long_answers_are_encoded_beside_the_steps(tokenizer, monkeypatch):
    encoders = []
    encode = Tokenizer.encode_returned

    def spy(self, *args, **options):
        encoders.append(threading.current_thread())
        return encode(self, *args, **options)

    session = make_session(tokenizer, f"{call_text('shout', word='x')}<|im_end|>Done.<|im_end|>")
    with Toolbox([shout]) as toolbox:
        chat(session, "x", toolbox)
        monkeypatch.setattr(Tokenizer, "encode_returned", spy)
        deltas, outputs = run(session)
    assert outputs["r"].outputs[0].answer == "Done."
    assert encoders and threading.current_thread() not in encoders
    assert [d.call.result for d in deltas if d.kind == "answered"] == ["X"]


def test_an_answer_that_cannot_be_encoded_ends_its_own_sequence_alone(tokenizer, monkeypatch):
    script = f"{call_text('shout', word='x')}<|im_end|>Done.<|im_end|>"
    session = make_session(tokenizer, script, "Fine.<|im_end|>")
    with Toolbox([shout]) as toolbox:
        chat(session, "x", toolbox)
        chat(session, "y", toolbox, "other")
        monkeypatch.setattr(Tokenizer, "encode_returned", lambda *args, **options: 1 // 0)
        _, outputs = run(session)
    assert outputs["r"].outputs[0].finish_reason == "error"
    assert outputs["other"].outputs[0].answer == "Fine."


def test_a_bad_resume_harms_nobody(tokenizer):
    session = make_session(tokenizer, "2+2?!<|im_end|>")
    session.add("Q:", SamplingParams(temperature=0, max_tokens=100), request_id="r",
                options=InterceptOptions(strings=("?",)))  # fmt: skip
    errors = []

    def answer(delta):
        if delta.kind == "intercepted":
            for bad in ({"text": 123}, {"token_ids": 5}):
                with pytest.raises(ValueError, match="expected a string, or a list of ids"):
                    session.resume("r", **bad)
            session.resume("r", token_ids=[[]], on_done=errors.append)
            session.resume(["r"], "4", on_done=errors.append)
            session.resume("r", " four")

    _, outputs = run(session, answer)
    assert outputs["r"].outputs[0].text.endswith("!")
    assert [type(error) for error in errors] == [ValueError, TypeError]


def test_interceptions_are_limited(tokenizer):
    call = call_text("shout", word="x")
    session = make_session(tokenizer, f"{call}<|im_end|>{call}<|im_end|>{call}<|im_end|>End.<|im_end|>")
    with Toolbox([shout]) as toolbox:
        chat(session, "x", toolbox, options=InterceptOptions(max_interceptions=2))
        _, outputs = run(session)
    assert outputs["r"].outputs[0].finish_reason == "tool_limit"
    assert len(outputs["r"].interceptions) == 2


def test_a_string_intercepts_and_a_handler_answers(tokenizer):
    session = make_session(tokenizer, "2+2=<calc>so four.<|im_end|>")
    options = InterceptOptions(strings=("<calc>",), handler=lambda text: f"[{text}→4]")
    session.add("Q:", SamplingParams(temperature=0, max_tokens=100), request_id="r", options=options)
    _, outputs = run(session)
    completion = outputs["r"].outputs[0]
    assert [s.text for s in completion.segments] == ["2+2=<calc>", "[2+2=<calc>→4]", "so four."]


def test_somebody_outside_resumes_by_text_or_by_ids(tokenizer):
    for given in ({"text": " four"}, {"token_ids": tokenizer.encode(" four", add_special_tokens=False)}):
        session = make_session(tokenizer, "2+2?!<|im_end|>")
        options = InterceptOptions(strings=("?",))
        session.add("Q:", SamplingParams(temperature=0, max_tokens=100), request_id="r", options=options)
        errors = []

        def answer(delta, session=session, given=given, errors=errors):
            if delta.kind == "intercepted":
                session.resume("r", **given, on_done=errors.append)
                session.resume("r", **given, on_done=errors.append)

        _, outputs = run(session, answer)
        assert [s.text for s in outputs["r"].outputs[0].segments] == ["2+2?", " four", "!"]
        assert errors[0] is None and isinstance(errors[1], StateError)
    with pytest.raises(ValueError, match="either text or token_ids"):
        session.resume("r")


def test_abort_while_a_tool_is_at_work(tokenizer):
    release = threading.Event()

    @tool
    def slow(word: str) -> str:
        """Waits until it is told."""
        assert release.wait(10)
        return word

    session = make_session(tokenizer, f"{call_text('slow', word='x')}<|im_end|>Never.<|im_end|>")

    def abort(delta):
        if delta.kind == "intercepted":
            session.abort("r")

    with Toolbox([slow]) as toolbox:
        chat(session, "slow", toolbox)
        _, outputs = run(session, abort)
        release.set()
    assert outputs["r"].outputs[0].finish_reason == "abort"
    assert outputs["r"].interceptions[0].outcome == "aborted"
    session.wait(1.0)  # the late answer changes nothing
    assert session.step() == [] and not session.has_work


def test_stop_strings_end_the_text_before_them(tokenizer):
    session = make_session(tokenizer, "one two three<|im_end|>")
    session.add("Q:", SamplingParams(temperature=0, max_tokens=100, stop=["two"]), request_id="r")
    deltas, outputs = run(session)
    completion = outputs["r"].outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("one ", "stop", "two")
    assert "".join(d.text for d in deltas) == "one "


def test_a_bad_request_leaves_nothing_behind(tokenizer):
    session = make_session(tokenizer, "x<|im_end|>")
    with pytest.raises(ValueError, match="prompt_ids"):
        session.add([], SamplingParams(), request_id="empty")
    with pytest.raises(ValueError, match="shorten the prompt"):
        session.add("y" * 5000, SamplingParams(), request_id="long")
    assert not session.has_work
