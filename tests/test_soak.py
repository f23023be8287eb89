"""A short soak: two minutes of the script that runs for thirty."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks/soak.py"


def test_two_minutes_of_rude_clients(tmp_path: Path):
    """64 clients, tools that fail, hang and crash: nothing is left, nothing is wrong, the server exits with 0."""
    out = tmp_path / "soak.json"
    command = [sys.executable, str(SCRIPT), "--minutes", "2", "--clients", "64", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    told = json.loads(out.read_text())
    assert not told["wrong"] and set(told["statuses"]) <= {"200", "400", "404", "409", "410", "429", "503"}
    assert min(told["outcomes"][name] for name in ("converse", "stream", "leave", "give_up", "malformed", "intercept"))
