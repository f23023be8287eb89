"""One engine on several hosts: they come together, the first one serves, the others obey, and none outlives another.

A host that is lost leaves the others in a collective that may never end, where no exception reaches them. So the
process itself ends: at once on a host that obeys, and on the first one after the moment that its clients need to be
told.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
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
TELL_S = 5.0  # in which the first host's clients hear of it
SHUTDOWN_S = 60  # a host that still compiles hears of the end when it has
HEARTBEAT_S = 20  # jax.distributed's own, behind ours


def start_distributed(hosts: Hosts) -> None:
    """Joins the hosts' devices. Before anything else of JAX. RuntimeError where they do not come together."""
    if jax.distributed.is_initialized():
        return
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


def follow(crew: Crew, model: Model) -> None:
    """Another host's life from there on. HostLostError where another one is lost."""
    try:
        sizes = crew.receive()
        if not isinstance(sizes, Sizes):
            raise HostLostError(f"host 0 sent {type(sizes).__name__}, expected sizes")
        runner = DeviceRunner(model, RunnerConfig(**sizes.values))
        runner.warm_up(meet=crew.meet)
        logger.info("this host obeys host 0")
        obey(runner, crew)
    except Exception as error:
        crew.wait_for_loss(TELL_S)
        crew.close(f"{type(error).__name__}: {error}")
        raise


def settings_of(config: EngineConfig) -> dict[str, str]:
    """What has to be the same on all hosts."""
    return {
        "jaxcept": jaxcept.__version__,
        "jax": jax.__version__,
        "model": repr(read_config(config.folder)),
        "dtype": config.dtype,
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


def _leave(crew: Crew) -> None:
    """At the end of the process: the others may go, unless one was lost; then nobody waits for it any more."""
    if crew.lost is not None:
        sys.stdout.flush()
        os._exit(EXIT_HOST_LOST)
    crew.close()
