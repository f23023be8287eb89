"""benchmarks/check_gpu.py: what it runs, and that a token which differs is a failure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import check_gpu, greedy_tokens

ROOT = Path(__file__).parent.parent


def test_it_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"finds no GPU, only cpu"):
        check_gpu.main(["--out", str(tmp_path)])


@pytest.mark.parametrize(("statuses", "failed"), [({}, False), ({"benchmarks/kernels.py": 3}, True)])
def test_every_stage_runs_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statuses: dict[str, int], failed: bool
) -> None:
    """The commands themselves are left out: each names files that there are."""

    def run(stage: str, command: list[str], extra: dict[str, str]) -> check_gpu.Run:
        assert all((ROOT / part).is_file() for part in command if part.endswith(".py"))
        return check_gpu.Run(stage, " ".join(command), statuses.get(command[0], 0), 0.0)

    monkeypatch.setattr(check_gpu, "run", run)
    monkeypatch.setattr(check_gpu, "ASK", 'print(\'{"platform": "gpu", "device": "one"}\')')
    assert check_gpu.main(["--out", str(tmp_path)]) == int(failed)
    told = json.loads((tmp_path / "check-gpu.json").read_text())
    assert [each["stage"] for each in told["runs"]] == ["tests", "tokens", "tokens", "kernels", "tiles"]
    assert told["device"] == "one"


def test_no_token_is_held_to_tokens_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_gpu, "run", lambda stage, command, extra: check_gpu.Run(stage, "", 1, 0.0))
    assert len(check_gpu.run_tokens(tmp_path, small=False)) == 1


def test_a_token_that_differs_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "tokens.json"
    call(monkeypatch, 0, "--policies", "swap", "--save", str(saved))
    assert json.loads(capsys.readouterr().out)["swapped_in_blocks"] > 0
    tokens = json.loads(saved.read_text())
    assert len(tokens) == 2 and all(tokens)
    monkeypatch.setattr(greedy_tokens, "generate", lambda *args: (tokens, {}))
    call(monkeypatch, 0, "--policies", "discard", "--against", str(saved))
    tokens[1][-1] += 1
    call(monkeypatch, 1, "--policies", "discard", "--against", str(saved))


def call(monkeypatch: pytest.MonkeyPatch, status: int, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["greedy_tokens.py", "--count", "2", *flags])
    assert greedy_tokens.main() == status
