"""Eight virtual CPU devices, full float32 products, a compilation cache, checked shapes."""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )

from jaxtyping import install_import_hook

install_import_hook(["bdjax", "pallas_kernels"], "beartype.beartype")

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update(
    "jax_compilation_cache_dir", str(Path(__file__).resolve().parents[1] / ".jax_cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

# The system ends a process with more memory maps (Linux: 65530), and every program
# compiled for the CPU holds some: a worker that ran half of the suite came to 49,000.
_MAPS = 40_000


def memory_maps() -> int:
    """Memory maps of this process; 0 where the system does not say."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Programs compiled for earlier files are forgotten before they are too many."""
    if memory_maps() > _MAPS:
        jax.clear_caches()
        gc.collect()
    yield
