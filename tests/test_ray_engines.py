"""Whose applications a server ends on a Ray cluster that others use too. Ray is a fake, a dictionary of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from jaxcept.config import EngineConfig
from jaxcept_serve.server import ServeConfig


class FakeRay:
    """What `ray` and `ray.serve` are asked for here. `silences`: applications, and since when nobody asked for them."""

    def __init__(self) -> None:
        self.silences: dict[str, float] = {}
        self.address: str | None = "never"
        self.is_running = False

    def modules(self) -> dict[str, ModuleType]:
        serve = SimpleNamespace(
            start=lambda http_options: None,
            deployment=lambda cls, **options: SimpleNamespace(
                options=lambda name: SimpleNamespace(bind=lambda config: name)
            ),
            RunTarget=SimpleNamespace,
            run_many=self.run_many,
            status=lambda: SimpleNamespace(applications=dict(self.silences)),
            get_app_handle=self.handle,
            delete=self.silences.pop,
            shutdown=self.silences.clear,
        )
        errors = {name: type(name, (Exception,), {}) for name in ("RayActorError", "RayTaskError")}
        ray = SimpleNamespace(
            serve=serve,
            is_initialized=lambda: self.is_running,
            init=self.init,
            cluster_resources=dict,
            shutdown=lambda: None,
        )
        found = {
            "ray": ray,
            "ray.serve": serve,
            "ray.exceptions": SimpleNamespace(**errors),
            "ray.serve.exceptions": SimpleNamespace(RayServeException=type("RayServeException", (Exception,), {})),
        }
        return {name: _module(name, vars(values)) for name, values in found.items()}

    def init(self, address: str | None, **_: Any) -> None:
        self.address, self.is_running = address, True

    def run_many(self, targets: list[Any]) -> list[str]:
        self.silences.update({target.name: 0.0 for target in targets})
        return [target.name for target in targets]

    def handle(self, name: str) -> Any:
        response = SimpleNamespace(result=lambda timeout_s: self.silences[name])
        return SimpleNamespace(silence_s=SimpleNamespace(remote=lambda: response))


def _module(name: str, values: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(values)
    return module


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    made = FakeRay()
    monkeypatch.delitem(sys.modules, "jaxcept_serve.ray_engines", raising=False)
    for name, module in made.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    yield made
    sys.modules.pop("jaxcept_serve.ray_engines", None)


def cluster(port: int = 8000) -> Any:
    from jaxcept_serve.ray_engines import Cluster  # with the fake in place of Ray

    return Cluster(ServeConfig(EngineConfig(), model_names=("my/model",), port=port), 2)


MINE = ["jaxcept-my-model-8000-engine-0", "jaxcept-my-model-8000-engine-1"]


def test_a_server_ends_its_own_engines_on_a_shared_cluster(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    fake.silences.update({"engine-0": 0.0, "somebody": 0.0})
    mine = cluster()
    assert [engine.name for engine in mine.start()] == ["engine-0", "engine-1"] and fake.address is None
    assert sorted(fake.silences) == sorted(["engine-0", "somebody", *MINE])
    mine.close()
    assert sorted(fake.silences) == ["engine-0", "somebody"]


def test_engines_of_another_server_are_let_alone(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    cluster().start()
    other = cluster()
    with pytest.raises(ValueError, match="jaxcept-my-model-8000-engine-0 is on this Ray cluster already"):
        other.start()
    other.close()
    assert sorted(fake.silences) == MINE
    assert len(cluster(8001).start()) == 2 and len(fake.silences) == 4


def test_engines_that_a_killed_server_left_are_taken_over(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    fake.silences.update(dict.fromkeys(MINE, 11.0))
    assert len(cluster().start()) == 2


def test_ray_that_was_started_for_a_server_ends_with_it(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    mine = cluster()
    mine.start()
    assert fake.address == "local" and len(fake.silences) == 2
    mine.close()
    assert not fake.silences
