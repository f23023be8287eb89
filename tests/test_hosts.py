"""Engines on several hosts: the same tokens as one, and nobody outlives another."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from checkpoints import build_checkpoint
from costs import HAND
from hosts_child import OPTIONS, tokens

import jaxcept.hosts as hosts_module
import jaxcept.runner.crew as crew_module
from jaxcept import LLM
from jaxcept.config import Hosts, shipped_model
from jaxcept.hosts import EXIT_HOST_LOST, EXIT_SIGTERM, follow, start_distributed
from jaxcept.runner.crew import Connection, Crew, HostLostError, Ready, Run, Sizes, Stop, decode, encode, gather, join
from jaxcept.scheduler.params import SamplingParams
from jaxcept.scheduler.plan import (
    BlockMove,
    Chunk,
    ChunkKind,
    Decodes,
    MoveKind,
    RowSetup,
    StepPlan,
    TableUpdate,
)
from jaxcept_models.model import Model
from jaxcept_models.saving import convert_checkpoint
from jaxcept_serve.cli import main

SETTINGS = {"jax": "1"}
CHILD = Path(__file__).with_name("hosts_child.py")


def free_port() -> int:
    """A port of which the next is free as well."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except OSError:
                continue


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_checkpoint("llama2", tmp_path_factory.mktemp("hosts") / "model", vocab_size=768, num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shipped_model() / name, folder / name)
    HAND.save(folder / "costs.json")
    convert_checkpoint(folder, folder.with_name("checkpoint"))
    return folder


@pytest.fixture
def children(folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    port = str(free_port())
    made = [
        subprocess.Popen(
            [
                sys.executable,
                str(CHILD),
                str(host_id),
                port,
                str(folder.with_name("checkpoint")),
                str(folder / "costs.json"),
                str(folder.with_name("cache")),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host_id in (0, 1)
    ]
    yield made
    for child in made:
        child.kill()
        child.communicate()


def test_two_hosts_give_the_tokens_of_one_and_end_when_one_is_killed(
    folder: Path, children: list[subprocess.Popen[str]]
) -> None:
    first, second = children
    llm = LLM(folder, progress=False, cost_model=folder / "costs.json", compilation_cache="", **OPTIONS)
    expected = tokens(llm)
    assert first.stdin is not None and first.stdout is not None
    line = next((line for line in first.stdout if line.startswith("[[")), None)  # Gloo prints too
    assert line is not None, [child.communicate()[1] for child in children]
    found, num_swapped, num_compiled = json.loads(line)
    assert found == expected and all(len(ids) == 20 for ids in found)
    assert num_swapped == llm.get_metrics()["swapped_out_blocks"] > 0
    assert num_compiled == 0  # nor is a swap a program there
    assert not any(folder.with_name("cache").rglob("*"))
    first.stdin.write("go on\n")
    first.stdin.flush()
    assert first.stdout.readline() == "again\n"
    second.kill()
    killed_at = time.monotonic()
    error = first.communicate(timeout=30)[1]
    assert first.returncode == EXIT_HOST_LOST, error[-2000:]
    assert "the run ends: host 1 (127.0.0.1) is lost" in error
    assert time.monotonic() - killed_at < 15


def connected(num_hosts: int = 2) -> tuple[list[Connection], list[Connection]]:
    """The first host's connections, and the others'."""
    address = ("127.0.0.1", free_port())
    joined: dict[int, Connection] = {}
    threads = [
        threading.Thread(target=lambda i=i: joined.update({i: join(address, i, SETTINGS, 5)}))
        for i in range(1, num_hosts)
    ]
    for thread in threads:
        thread.start()
    gathered = gather(address, num_hosts, SETTINGS, 5)
    for thread in threads:
        thread.join()
    return gathered, [joined[i] for i in sorted(joined)]


def never(error: HostLostError) -> None:
    raise AssertionError(error)


PLAN = StepPlan(
    7,
    Decodes((1, 2), (0, 1), (5, 9)),
    (Chunk(3, 2, ChunkKind.RETURNED, 4, (1, 2, 3), True, 1),),
    (TableUpdate(0, 1, (4, 5)),),
    (RowSetup(1, 2, SamplingParams(logit_bias={3: 1.5}, stop="x", seed=2**63), 2**64 - 1, (1,), ((0, 1),), 1, (2,)),),
    (BlockMove(MoveKind.SWAP_OUT, 1, 2),),
    True,
)


def test_a_plan_is_the_same_behind_the_wire() -> None:
    message = decode(encode(Run.of(PLAN, (None, 3)))[4:])
    assert isinstance(message, Run)
    assert message.plan == PLAN and message.swaps_over == (None, 3)
    assert isinstance(message.plan.chunks[0].kind, ChunkKind) and isinstance(message.plan.rows[0], RowSetup)


@pytest.mark.parametrize("body", [b"", b"junk", b"\x81\xa4type\xa3Run", b"\xff" * 100])
def test_what_is_no_message_is_an_error_of_the_host_that_sent_it(body: bytes) -> None:
    with pytest.raises(HostLostError, match="no message"):
        decode(body)


def test_messages_come_in_order_and_all_hosts_meet() -> None:
    first_ends, other_ends = connected(3)
    first = Crew(first_ends, never, is_first=True)
    others = [Crew([end], never, is_first=False) for end in other_ends]
    for i in range(100):
        first.send(Sizes({"step": i}))
    for other in others:
        assert [other.receive() for _ in range(100)] == [Sizes({"step": i}) for i in range(100)]
    threads = [threading.Thread(target=other.meet) for other in others]
    for thread in threads:
        thread.start()
    first.meet()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    first.close()
    assert [other.receive() for other in others] == [Stop(), Stop()]
    for other in others:
        other.close()


def test_a_host_that_fails_says_why() -> None:
    (first_end,), (other_end,) = connected()
    seen: list[HostLostError] = []
    first = Crew([first_end], seen.append, is_first=True)
    Crew([other_end], never, is_first=False).close("RuntimeError: 3 swaps failed on this host")
    with pytest.raises(HostLostError, match=r"host 1 \(127.0.0.1\) failed: RuntimeError: 3 swaps"):
        first.receive()
    with pytest.raises(HostLostError, match="swaps"):
        first.send(Ready())
    assert len(seen) == 1
    first.close()


def test_a_host_that_leaves_is_lost_to_the_first() -> None:
    first_ends, other_ends = connected(3)
    seen: list[HostLostError] = []
    first = Crew(first_ends, seen.append, is_first=True)
    others = [Crew([end], seen.append, is_first=False) for end in other_ends]
    others[0].close()  # without a reason, as at the end of a process
    with pytest.raises(HostLostError, match=r"host 1 \(127.0.0.1\) failed: it left"):
        first.meet()
    assert len(seen) == 1
    first.close()
    others[1].close()


@pytest.mark.parametrize(
    ("error", "told"), [(KeyboardInterrupt(), "KeyboardInterrupt"), (OSError("the disk"), "OSError: the disk")]
)
def test_a_host_that_ends_while_it_loads_says_why(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, told: str
) -> None:
    monkeypatch.setattr(hosts_module, "TELL_S", 0.05)
    (first_end,), (other_end,) = connected()
    seen: list[HostLostError] = []
    first = Crew([first_end], seen.append, is_first=True)
    other = Crew([other_end], never, is_first=False)

    def load() -> Model:
        raise error

    with pytest.raises(type(error)):
        follow(other, load)
    with pytest.raises(HostLostError, match=rf"host 1 .* failed: {told}$"):
        first.receive()
    first.close()


def test_silence_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_module, "SILENCE_S", 0.3)
    (first_end,), (other_end,) = connected()
    seen: list[HostLostError] = []
    first = Crew([first_end], seen.append, is_first=True)  # the other end is open, and sends nothing
    with pytest.raises(HostLostError, match=r"host 1 .* nothing came from it for 0.3 s"):
        first.receive()
    assert len(seen) == 1
    first.close()
    other_end.close()


def test_signs_of_life_are_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_module, "SILENCE_S", 0.5)
    monkeypatch.setattr(crew_module, "BEAT_S", 0.05)
    (first_end,), (other_end,) = connected()
    first = Crew([first_end], never, is_first=True)
    other = Crew([other_end], never, is_first=False)
    time.sleep(1.0)
    first.send(Ready())
    assert other.receive() == Ready()
    first.close()
    other.close()


def test_hosts_that_differ_are_told_so() -> None:
    address = ("127.0.0.1", free_port())
    told: list[object] = []

    def other() -> None:
        connection = join(address, 1, {"jax": "2"}, 5)
        told.append(connection.receive())
        connection.close()

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(HostLostError, match="host 1 does not fit: jax is 2 there, and 1 on host 0"):
        gather(address, 2, SETTINGS, 5)
    thread.join()
    assert told == [Stop("host 1 does not fit: jax is 2 there, and 1 on host 0")]


def test_hosts_that_do_not_come_are_named() -> None:
    address = ("127.0.0.1", free_port())
    with pytest.raises(HostLostError, match="there is no host 1, 2"):
        gather(address, 3, SETTINGS, 0.2)
    with pytest.raises(HostLostError, match="host 0 is not at 127"):
        join(address, 1, SETTINGS, 0.2)


def test_strangers_are_not_taken_for_hosts(caplog: pytest.LogCaptureFixture) -> None:
    address = ("127.0.0.1", free_port())
    found: list[list[Connection]] = []
    thread = threading.Thread(target=lambda: found.append(gather(address, 2, SETTINGS, 10)))
    thread.start()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(address) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            break
        except OSError:
            time.sleep(0.01)
    other = join(address, 1, SETTINGS, 5)
    thread.join()
    assert [connection.name for connection in found[0]] == ["host 1 (127.0.0.1)"]
    assert "no host's" in caplog.text
    other.close()
    found[0][0].close()


_OTHER = """
import sys
from jaxcept.runner.crew import Crew, Ready, join
crew = Crew([join(("127.0.0.1", int(sys.argv[1])), 1, {"jax": "1"}, 20)], print, is_first=False)
crew.send(Ready())
crew.receive()
"""


def test_a_host_that_is_killed_is_lost_at_once() -> None:
    port = free_port()
    with subprocess.Popen([sys.executable, "-c", _OTHER, str(port)]) as child:
        seen: list[HostLostError] = []
        first = Crew(gather(("127.0.0.1", port), 2, SETTINGS, 20), seen.append, is_first=True)
        assert first.receive() == Ready()
        child.send_signal(signal.SIGKILL)
        with pytest.raises(HostLostError, match="is lost"):
            first.wait_for_loss(5)
        assert len(seen) == 1
        first.close()


_HEEDING = """
import ctypes, sys
import jaxcept.hosts as hosts
from jaxcept.runner.crew import Crew, Ready, Stop, join
hosts.TELL_S = 0.1
crew = Crew([join(("127.0.0.1", int(sys.argv[1])), 1, {"jax": "1"}, 20)], print, is_first=False)
hosts.heed_sigterm(crew, float(sys.argv[2]))
crew.send(Ready())
if sys.argv[3] == "busy":  # as in a collective: no handler in Python runs
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)
crew.receive()
"""


@pytest.mark.parametrize(("grace_s", "how", "status"), [(0.1, "busy", EXIT_SIGTERM), (60, "idle", 0)])
def test_sigterm_ends_a_host_that_obeys(grace_s: float, how: str, status: int) -> None:
    port = free_port()
    with subprocess.Popen([sys.executable, "-c", _HEEDING, str(port), str(grace_s), how]) as child:
        seen: list[HostLostError] = []
        first = Crew(gather(("127.0.0.1", port), 2, SETTINGS, 60), seen.append, is_first=True)
        assert first.receive() == Ready()
        child.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        if how == "idle":  # host 0 was told as well, and has drained
            first.close()
        try:
            assert child.wait(10) == status
        finally:
            child.kill()
        assert [str(error) for error in seen] == (["host 1 (127.0.0.1) failed: SIGTERM"] if how == "busy" else [])
        first.close()


def test_several_hosts_have_no_compilation_cache_and_end_by_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("jax_enable_compilation_cache", "jax_enable_preemption_service")
    before = {name: jax.config.values[name] for name in names}
    found: list[dict[str, object]] = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *_, **__: found.append({name: jax.config.values[name] for name in names})
    )
    try:
        start_distributed(Hosts("host:1", 2, 1))
    finally:
        for name in names:
            jax.config.update(name, before[name])
    assert found == [dict.fromkeys(names, False)]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (("nowhere", 2, 0), "expected HOST:PORT"),
        (("host:99999", 2, 0), "expected HOST:PORT"),
        (("host:1", 1, 0), "--num-hosts 1: expected 2"),
        (("host:1", 2, 2), "--host-id 2: expected 0 to 1"),
    ],
)
def test_hosts_are_named_whole(values: tuple[str, int, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Hosts(*values)


def test_the_flags_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--num-hosts", "2", "x"]) == 2
    assert "--coordinator is missing" in capsys.readouterr().err
    assert Hosts("[::1]:80", 2, 1).plan_address == ("::1", 81)
