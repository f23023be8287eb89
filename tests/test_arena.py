"""The arena: the same requests for everybody, curves and tables by hand, and the commands end to end."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from jaxcept.arena.cases import Case, Sizes, Traffic, grid, label, run_case, run_cases
from jaxcept.arena.curves import Sustained, by_label, compare, sustained
from jaxcept.arena.plots import CURVES, FORMATS, save_plots
from jaxcept.arena.tables import COLUMNS, load, markdown, save, sustained_rows
from jaxcept.simulator.report import Quantiles, Report
from jaxcept_serve.cli import main

TRAFFIC = Traffic("mix", 10, length_scale=0.1)


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    return run_cases(grid("gptj-6b@a100", TRAFFIC, [1.0, 2.0], ["discard", "preserve"]))


def with_latency(
    report: Report, rate: float, latency: float, makespan: float = 10.0, policy: str = "discard"
) -> Report:
    return replace(
        report,
        info=replace(report.info, rate=rate, policy=policy),
        normalized_latency=Quantiles(latency, latency, latency, latency, latency),
        makespan_s=makespan,
    )


def test_every_policy_gets_the_same_requests(reports: list[Report]):
    assert [(report.info.policy, report.info.rate) for report in reports] == [
        ("discard", 1.0), ("discard", 2.0), ("preserve", 1.0), ("preserve", 2.0)
    ]  # fmt: skip
    assert len({report.tokens["generated"] for report in reports}) == 1
    assert all(report.num_finished == 10 and report.num_clipped == 0 for report in reports)


def test_processes_change_nothing(reports: list[Report]):
    assert run_cases(grid("gptj-6b@a100", TRAFFIC, [1.0, 2.0], ["discard", "preserve"]), jobs=2) == reports


def test_sizes_of_the_deployment_can_be_changed():
    case = Case("gptj-6b@a100", TRAFFIC, 1.0, "preserve", sizes=Sizes(num_blocks=40, max_num_seqs=3))
    info = run_case(case).info
    assert (info.num_blocks, info.max_num_seqs, info.max_model_len) == (40, 3, 2048)


@pytest.mark.parametrize(
    "names", [{"policies": ["keep"]}, {"policies": ["preserve"], "orders": ["lifo"]},
              {"policies": ["preserve"], "estimators": ["guess"]}]
)  # fmt: skip
def test_unknown_names_are_refused_before_anything_runs(names: dict[str, list[str]]):
    with pytest.raises(ValueError, match="expected"):
        grid("gptj-6b@a100", TRAFFIC, [1.0], **names)


def test_labels_name_what_is_unusual():
    assert label("min-waste", "fcfs", "elapsed") == "min-waste"
    assert label("min-waste", "mlfq", "oracle") == "min-waste +mlfq +oracle"


def test_the_sustained_rate_is_interpolated(reports: list[Report]):
    curve = [with_latency(reports[0], rate, latency) for rate, latency in ((1.0, 0.1), (2.0, 0.2), (4.0, 0.6))]
    assert sustained(curve, 0.3) == Sustained(0.3, 2.5, False)
    assert sustained(curve, 0.05).rate is None and str(sustained(curve, 0.05)) == "below"
    assert sustained(curve, 0.7) == Sustained(0.7, 4.0, True) and str(sustained(curve, 0.7)) == "≥ 4.00"
    assert sustained(curve, 0.3).over(sustained(curve, 0.15)) == 2.5 / 1.5
    assert sustained(curve, 0.3).over(sustained(curve, 0.7)) is None


def test_the_ratio_is_to_discards(reports: list[Report]):
    runs = [with_latency(reports[0], rate, rate * scale, policy=policy)
            for policy, scale in (("discard", 0.1), ("best", 0.05)) for rate in (1.0, 4.0)]  # fmt: skip
    rows = {row[0]: row[1:] for row in sustained_rows(runs)}
    assert rows["discard"] == ["below", "below", "1.00 (1.00×)", "2.00 (1.00×)", "≥ 4.00"]
    assert rows["best"][3] == "4.00" or rows["best"][3].startswith("≥ 4.00")
    assert sustained_rows(runs[:1]) == []


def test_predicted_and_measured_runs_are_compared(reports: list[Report]):
    def runs(*latencies: float, makespan: float) -> list[Report]:
        return [with_latency(reports[0], 1.0, latency, makespan, policy)
                for policy, latency in zip("abc", latencies, strict=True)]  # fmt: skip

    agreement = compare(runs(1.0, 2.0, 3.0, makespan=9.0), runs(1.0, 3.0, 2.0, makespan=10.0))
    assert agreement.predicted_order == ("a", "b", "c") and agreement.measured_order == ("a", "c", "b")
    assert agreement.pair_share == 2 / 3
    assert agreement.worst_makespan_error == pytest.approx(0.1)
    assert "| a | 1 | 9.00 | 10.00 | -10.0% |" in agreement.markdown()
    with pytest.raises(ValueError, match="runs differ"):
        compare(reports, reports[:2])


def test_tables_are_saved_and_read_again(reports: list[Report], tmp_path: Path):
    paths = save(reports, tmp_path / "out", "a title", ["a note"])
    assert load(paths[0]) == reports
    text = paths[1].read_text(encoding="utf-8")
    assert text == markdown(reports, "a title", ["a note"])
    assert text.count("\n| discard |") >= 2 and "a note" in text
    assert all(line.count("|") == len(COLUMNS) + 1 for line in text.splitlines() if line.startswith("| preserve | 1"))
    assert list(by_label(reports)) == ["discard", "preserve"]


needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra")


@needs_matplotlib
def test_plots_are_saved(reports: list[Report], tmp_path: Path):
    paths = save_plots(reports, tmp_path)
    assert {path.name for path in paths} == {f"{name}.{kind}" for name in [*CURVES, "waste"] for kind in FORMATS}
    assert all(path.stat().st_size > 1000 for path in paths)


COMMON = ("--workload", "mix", "--num-requests", "6", "--length-scale", "0.1", "--time-scale", "0.1")


def test_bench_intercept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["bench", "intercept", "--simulate", "gptj-6b@a100", "--policies", "discard,preserve", "--rates", "1,4"]
    assert main([*argv, *COMMON, "--out", str(tmp_path)]) == 0
    assert "preserve" in capsys.readouterr().out
    data = json.loads((tmp_path / "reports.json").read_text(encoding="utf-8"))
    assert len((tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert len(data["reports"]) == 4 and data["reports"][0]["info"]["length_scale"] == 0.1
    assert "7888 blocks" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_simulate(capsys: pytest.CaptureFixture[str]):
    assert main(["simulate", "gptj-6b@a100", "--policy", "discard", "--rate", "3", *COMMON]) == 0
    assert "requests/s, 6 requests, seed 0" in capsys.readouterr().out
    assert main(["simulate", "gptj-6b@a100", "--policy", "preserve", *COMMON, "--json"]) == 0
    assert Report.from_dict(json.loads(capsys.readouterr().out)).info.policy == "preserve"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["simulate", "gptj-6b@abacus"], "no deployment and no file"),
        (["simulate", "gptj-6b@a100", "--workload", "agent"], "shorten it with a length scale"),
        (["bench", "intercept", "--policies", "keep"], "'keep': expected one of discard"),
        (["bench", "intercept", "--rates", "0"], "rate=0"),
    ],
)
def test_mistakes_are_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main([*argv, "--num-requests", "20"]) == 2
    assert message in capsys.readouterr().err
