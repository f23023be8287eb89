"""One engine on several hosts: they come together, the first one serves, the others obey, and none outlives another.

A host that is lost leaves the others in a collective that may never end, where no exception reaches them. So the
process itself ends: at once on a host that obeys, and on the first one after the moment that its clients need to be
told.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict

import jax

import jaxcept
from jaxcept.config import EngineConfig, Hosts
from jaxcept.runner.crew import Crew, HostLostError, Sizes, gather, join
from jaxcept.runner.remote import LeadRunner, obey
from jaxcept.runner.runner import DeviceRunner, RunnerConfig
from jaxcept_models.config import read_config
from jaxcept_models.model import Model

logger = logging.getLogger(__name__)

EXIT_HOST_LOST = 72
EXIT_SIGTERM = 128 + signal.SIGTERM
TELL_S = 5.0  # in which the first host's clients hear of it
SHUTDOWN_S = 60  # a host that still compiles hears of the end when it has
HEARTBEAT_S = 20  # jax.distributed's own, behind ours


def start_distributed(hosts: Hosts) -> None:
    """Joins the hosts' devices. Before anything else of JAX. RuntimeError where they do not come together."""
    if jax.distributed.is_initialized():
        return
    # Only process 0 writes the cache, and XLA shares out its autotuning: who compiles waits for those who need not.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_enable_preemption_service", False)  # it takes note of SIGTERM, and nothing else does
    jax.distributed.initialize(
        hosts.coordinator,
        hosts.num_hosts,
        hosts.host_id,
        initialization_timeout=int(hosts.timeout_s),
        heartbeat_timeout_seconds=HEARTBEAT_S,
        shutdown_timeout_seconds=SHUTDOWN_S,
    )


def check_devices(config: EngineConfig) -> None:
    """ValueError where the mesh is not all devices of all hosts."""
    if config.num_devices != jax.device_count():
        raise ValueError(
            f"tensor_parallel_size={config.tensor_parallel_size} times data_parallel_size={config.data_parallel_size} "
            f"is {config.num_devices}, and the hosts have {jax.device_count()} devices; expected the same"
        )


def assemble(config: EngineConfig) -> Crew:
    """Brings the hosts together, before anything else of JAX and before the model is loaded.

    RuntimeError or HostLostError where they do not come, or differ in what has to be the same; ValueError where their
    devices are not the mesh.
    """
    hosts = config.hosts
    assert hosts is not None, "one host needs no others"
    start_distributed(hosts)
    if hosts.host_id:
        connections = [join(hosts.plan_address, hosts.host_id, settings_of(config), hosts.timeout_s)]
        crew = Crew(connections, _end_at_once, is_first=False)
    else:
        connections = gather(hosts.plan_address, hosts.num_hosts, settings_of(config), hosts.timeout_s)
        crew = Crew(connections, _end_soon, is_first=True)
    atexit.register(_leave, crew)
    check_devices(config)
    return crew


def lead(crew: Crew, model: Model, sizes: RunnerConfig) -> LeadRunner:
    """The first host's runner."""
    crew.send(Sizes(asdict(sizes)))
    return LeadRunner(crew, model, sizes)


def heed_sigterm(crew: Crew, grace_s: float) -> None:
    """SIGTERM on another host than the first ends the process, however busy its main thread is. To be called there.

    Whoever sends it may have sent it to all: so the first host has its `grace_s` to drain, and ends this one sooner.
    """
    heard, told = socket.socketpair()
    told.setblocking(False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.set_wakeup_fd(told.fileno())
    threading.Thread(target=_wait_for_sigterm, args=(heard, told, crew, grace_s), daemon=True).start()


def follow(crew: Crew, load: Callable[[], Model]) -> None:
    """Another host's life from the loading of the model on. HostLostError where another one is lost."""
    try:
        model = load()
        sizes = crew.receive()
        if not isinstance(sizes, Sizes):
            raise HostLostError(f"host 0 sent {type(sizes).__name__}, expected sizes")
        runner = DeviceRunner(model, RunnerConfig(**sizes.values))
        runner.warm_up(meet=crew.meet)
        logger.info("this host obeys host 0")
        obey(runner, crew)
    except BaseException as error:
        if isinstance(error, Exception):
            crew.wait_for_loss(TELL_S)
        crew.close(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        raise


def settings_of(config: EngineConfig) -> dict[str, str]:
    """What has to be the same on all hosts."""
    return {
        "jaxcept": jaxcept.__version__,
        "jax": jax.__version__,
        "model": repr(read_config(config.folder)),
        "dtype": config.dtype,
        "kv_cache_dtype": config.kv_cache_dtype,
        "implementation": config.implementation,
        "load_format": config.load_format,
        "seed": str(config.seed),
        "mesh": f"{config.data_parallel_size} x {config.tensor_parallel_size}",
    }


def _end_at_once(error: HostLostError) -> None:
    logger.critical("the run ends: %s", error)
    print(f"jaxcept: the run ends: {error}", file=sys.stderr, flush=True)
    os._exit(EXIT_HOST_LOST)


def _end_soon(error: HostLostError) -> None:
    logger.critical("the run ends: %s", error)
    print(f"jaxcept: the run ends: {error}", file=sys.stderr, flush=True)
    end = threading.Timer(TELL_S, os._exit, (EXIT_HOST_LOST,))
    end.daemon = True
    end.start()


def _wait_for_sigterm(heard: socket.socket, told: socket.socket, crew: Crew, grace_s: float) -> None:
    while heard.recv(1) != bytes([signal.SIGTERM]):  # of each signal its number; `told` stays open meanwhile
        pass
    logger.info("SIGTERM: this host ends with host 0, or after %g s", grace_s + TELL_S)
    time.sleep(grace_s + TELL_S)
    crew.close("SIGTERM")
    os._exit(EXIT_SIGTERM)


def _leave(crew: Crew) -> None:
    """At the end of the process: the others may go, unless one was lost; then nobody waits for it any more."""
    if crew.lost is not None:
        sys.stdout.flush()
        os._exit(EXIT_HOST_LOST)
    crew.close()
