"""Every test runs under the strictest settings that JAX has, on eight virtual CPU devices."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation, and most programs run a few times: XLA's own passes are as ever, LLVM's
# expensive ones are left out. On a GPU the programs are those that users run.
os.environ["XLA_FLAGS"] = " ".join(
    [
        *(os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"),
        *(
            ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
            if os.environ["JAX_PLATFORMS"] == "cpu"
            else []
        ),
    ]
).strip()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads spin: beside other processes that takes minutes

import jax
import pytest
from costs import SLOW
from hypothesis import HealthCheck, settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Engines of equal sizes in different tests compile once, in whichever process. With a bound JAX locks the files.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".cache" / "xla-tests"))
jax.config.update("jax_compilation_cache_max_size", 8 << 30)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

settings.register_profile("jaxcept", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("jaxcept")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The soak first: it takes its time whatever else runs, and last it would run alone."""
    items.sort(key=lambda item: item.path.name != "test_soak.py")


@pytest.fixture(scope="session")
def slow_costs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cost model's file. What an engine measures on a busy machine may be anything, and its policy goes by it."""
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    SLOW.save(path)
    return path
