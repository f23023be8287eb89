"""What /metrics tells, of engines that one can check by hand."""

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.testclient import TestClient

from jaxcept.scheduler.events import Finished
from jaxcept.scheduler.params import SamplingParams
from jaxcept.scheduler.policies.discard import Discard
from jaxcept.scheduler.policies.swap import Swap
from jaxcept.scheduler.request import Request
from jaxcept_serve.histograms import Histogram, Names, token_bounds
from jaxcept_serve.telemetry import Telemetry
from jaxcept_serve.turns import Usage
from tests.fakes import Rig, scripted


def observe(rig: Rig, telemetry: Telemetry, limit: int = 200) -> None:
    """Steps until nothing can be computed; the telemetry sees every step."""
    while rig.engine.has_work:
        before = len(rig.events)
        rig.step()
        telemetry.on_step(rig.engine, rig.events[before:], rig.clock.now())
        limit -= 1
        assert limit


def scrape(telemetry: Telemetry) -> dict[tuple[str, ...], float]:
    """Samples by (name, label values in order of the labels' names), the model's and engine's labels left out."""
    body, content_type = telemetry.render()
    assert content_type.startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "m" and labels.pop("engine") == "0"
            found[(sample.name, *[labels[key] for key in sorted(labels)])] = sample.value
    return found


def test_histograms_count_up_to_and_with_their_bounds():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    histogram.observe(2.0, times=3)
    assert histogram.cumulative() == [("1.0", 2.0), ("2.0", 7.0), ("+Inf", 8.0)]
    assert histogram.total == 20.0 and histogram.count == 8
    assert token_bounds(60) == (1, 2, 5, 10, 20, 50)


def test_tool_names_past_the_limit_become_other():
    names = Names(limit=2, max_length=8)
    assert names.label("a") == "a" and names.label("line\nbreak") == "line?bre"
    assert names.label("c") == "other" and names.label("a") == "a"
    assert names.label("line\nbreak and more") == "line?bre"
    assert Names().label("\ud800") == "?"


def test_tokens_latencies_and_interceptions_of_one_request():
    """Six prompt tokens at 0 s, a token at 0 s and each second after; the tool answers after 10 s."""
    rig, telemetry = Rig(), Telemetry("m", 64)
    seq_id = rig.add("r", range(6), scripted(2), max_tokens=4)
    observe(rig, telemetry)
    waiting = scrape(telemetry)
    assert waiting["jaxcept:num_requests_intercepted",] == 1 and waiting["vllm:num_requests_running",] == 0
    assert waiting["jaxcept:intercepted_blocks", "device"] == 2 and waiting["jaxcept:intercepted_blocks", "host"] == 0
    rig.clock.advance(10.0)
    rig.engine.resume(seq_id, [7, 8])
    answered_at = rig.clock.now()
    observe(rig, telemetry)
    figures = scrape(telemetry)
    (record,) = rig.told(Finished)[0].interceptions
    assert record.duration_s == pytest.approx(answered_at - record.started_at)
    assert figures["vllm:prompt_tokens_total",] == 6 and figures["vllm:generation_tokens_total",] == 4
    assert figures["vllm:time_to_first_token_seconds_count",] == 1
    assert figures["vllm:inter_token_latency_seconds_count",] == 2, "the wait for the tool is between no two tokens"
    assert figures["vllm:inter_token_latency_seconds_sum",] == 2.0
    assert figures["jaxcept:interceptions_total", "returned", "scripted"] == 1
    assert figures["jaxcept:interception_seconds_sum", "scripted"] == pytest.approx(record.duration_s)
    assert figures["jaxcept:interception_residency_total", "preserved"] == 1
    assert figures["jaxcept:resume_delay_seconds_count", "preserved"] == 1
    assert figures["jaxcept:resume_time_to_first_token_seconds_count",] == 1
    assert figures["jaxcept:interception_prediction_error_seconds_count",] == 1
    assert figures["jaxcept:resumed_tokens_total", "device"] == record.context_tokens
    assert figures["jaxcept:waste_byte_seconds_total", "held"] == rig.engine.ledger.waste.held > 0
    assert figures["jaxcept:num_requests_intercepted",] == 0


def test_a_request_that_ends_with_its_first_token_is_counted_once():
    rig, telemetry = Rig(), Telemetry("m", 64)
    rig.add("one", range(6), max_tokens=1)
    rig.add("two", range(5), max_tokens=2)
    observe(rig, telemetry)
    figures = scrape(telemetry)
    assert figures["vllm:time_to_first_token_seconds_count",] == 2 and figures["vllm:prompt_tokens_total",] == 11
    assert figures["vllm:request_queue_time_seconds_count",] == 2
    assert figures["vllm:request_time_per_output_token_seconds_count",] == 1


def test_aborted_and_given_up_contexts_are_told_apart():
    rig, telemetry = Rig(Discard()), Telemetry("m", 64)
    first = rig.add("first", range(9), scripted(2), max_tokens=6)
    rig.add("second", range(20, 29), scripted(2), max_tokens=6)
    observe(rig, telemetry)
    figures = scrape(telemetry)
    assert figures["jaxcept:intercepted_blocks", "dropped"] > 0 and figures["jaxcept:intercepted_blocks", "device"] == 0
    rig.engine.abort("second")
    rig.engine.resume(first, [3])
    observe(rig, telemetry)
    figures = scrape(telemetry)
    assert figures["jaxcept:interceptions_total", "aborted", "scripted"] == 1
    assert figures["jaxcept:interceptions_total", "returned", "scripted"] == 1
    (record,) = next(event for event in rig.told(Finished) if event.request_id == "first").interceptions
    found = record.num_recomputed + record.num_cached_on_return
    assert (
        0 < found == sum(figures["jaxcept:resumed_tokens_total", source] for source in ("recomputed", "prefix_cache"))
    )


def test_swapped_blocks_are_bytes_by_direction():
    rig, telemetry = Rig(Swap(), num_host_blocks=16), Telemetry("m", 64)
    seq_id = rig.add("r", range(9), scripted(2), max_tokens=4)
    observe(rig, telemetry)
    figures = scrape(telemetry)
    moved = rig.scheduler.counters.swapped_out_blocks
    assert moved > 0 and figures["jaxcept:intercepted_blocks", "host"] == moved
    hidden = "no" if rig.scheduler.policy.traits.waits_for_swaps else "yes"
    assert figures["jaxcept:swap_bytes_total", "out", hidden] == moved * 100
    rig.engine.resume(seq_id, [1])
    observe(rig, telemetry)
    figures = scrape(telemetry)
    assert figures["jaxcept:resumed_tokens_total", "host"] > 0
    assert figures["jaxcept:swap_bytes_total", "in", hidden] > 0


def test_a_conversation_that_goes_on_in_another_request_is_two_requests():
    rig, telemetry = Rig(), Telemetry("m", 64)
    rig.add("first", range(6), scripted(2), max_tokens=4)
    observe(rig, telemetry)
    (seq,) = rig.scheduler.sequences.values()
    rig.clock.advance(5.0)
    rig.engine.follow("first", Request("next", (*seq.token_ids, 3, 4), SamplingParams(max_tokens=2)))
    observe(rig, telemetry)
    figures = scrape(telemetry)
    assert figures["vllm:time_to_first_token_seconds_count",] == 2
    assert figures["vllm:time_to_first_token_seconds_sum",] < 5.0
    assert figures["jaxcept:resume_time_to_first_token_seconds_count",] == 1


def test_an_engine_that_died_is_down():
    rig, telemetry = Rig(), Telemetry("m", 64)
    rig.add("r", range(6), max_tokens=4)
    rig.runner.fail_at = 1
    observe(rig, telemetry)
    assert scrape(telemetry)["jaxcept:engine_up",] == 0


def test_turns_are_counted_as_their_clients_see_them():
    telemetry = Telemetry("m", 64, max_tools=1)
    telemetry.turn_finished("tool_calls")
    telemetry.turn_done(0.4, Usage(prompt_tokens=10, completion_tokens=3, cached_tokens=6))
    telemetry.turn_refused(429)
    telemetry.tool_answered("add", False, 0.5)
    telemetry.tool_answered("sub", True, 0.25)
    telemetry.held = lambda: 7.0
    figures = scrape(telemetry)
    assert (
        figures["vllm:request_success_total", "tool_calls"] == 1 and figures["vllm:request_success_total", "stop"] == 0
    )
    assert figures["vllm:e2e_request_latency_seconds_bucket", "0.5"] == 1
    assert figures["vllm:e2e_request_latency_seconds_bucket", "0.3"] == 0
    assert figures["jaxcept:turn_tokens_total", "cached"] == 6
    assert figures["jaxcept:refused_requests_total", "429"] == 1 and figures["jaxcept:held_conversations",] == 7
    assert figures["jaxcept:tool_calls_total", "ok", "add"] == 1
    assert figures["jaxcept:tool_calls_total", "error", "other"] == 1


def test_metrics_come_in_the_form_that_the_scraper_asks_for():
    client = TestClient(Starlette(routes=[Telemetry("m", 64).route()]))
    plain = client.get("/metrics")
    assert plain.status_code == 200 and "vllm:num_requests_running{" in plain.text
    openmetrics = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


SHARED = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "num_preemptions",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
]


@pytest.mark.parametrize("name", SHARED)
def test_names_that_dashboards_for_vllm_read(name: str):
    telemetry = Telemetry("m", 64)
    assert f"vllm:{name}" in {family.name for family in telemetry.collect()}


def exported() -> set[str]:
    """Names of all samples, those of empty labelled families included."""
    telemetry = Telemetry("m", 64)
    telemetry.held = lambda: 0.0
    names = set()
    for family in telemetry.collect():
        match family.type:
            case "counter":
                names.add(f"{family.name}_total")
            case "histogram":
                names |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
            case _:
                names.add(family.name)
    return names | {"jaxcept:step_prediction_error_ratio"}  # from the first measured step on


def test_every_query_of_the_dashboard_names_a_metric_that_is_exported():
    dashboard = json.loads((files("jaxcept_serve") / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(expressions) > 20
    for expression in expressions:
        named = re.findall(r"(?:vllm|jaxcept):[a-z0-9_]+", expression)
        assert named and set(named) <= exported(), expression
    queried = {name for expression in expressions for name in re.findall(r"(?:vllm|jaxcept):[a-z0-9_]+", expression)}
    assert {"jaxcept:waste_byte_seconds_total", "jaxcept:intercepted_blocks", "jaxcept:interceptions_total"} <= queried


def test_every_metric_is_documented():
    text = (Path(__file__).parent.parent / "docs" / "observing.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:vllm|jaxcept):[a-z0-9_]+)`", text)) | {"vllm:num_requests_waiting"}
    telemetry = Telemetry("m", 64)
    telemetry.held = lambda: 0.0
    families = {family.name + ("_total" if family.type == "counter" else "") for family in telemetry.collect()}
    assert named == families | {"jaxcept:step_prediction_error_ratio"}
