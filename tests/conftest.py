"""Eight virtual CPU devices, full float32 products, a compilation cache, checked shapes.

Nearly all time of these tests is compilation of programs that run once, so XLA is asked for quick
rather than fast code: a third to a half of the CPU time. `make test-slow` runs on the code that
users run; so does any test with `XLA_FLAGS=--xla_backend_optimization_level=3`.
"""

import gc
import mmap
import os
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


def known(flag: str) -> bool:
    """Whether the installed XLA has a flag: one that it does not know would end the process."""
    library = Path(find_spec("jaxlib").origin).parent / "libjax_common.so"
    if not library.exists():  # where another jaxlib has its code is not known either
        return False
    with library.open() as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as text:
        # As a string of its own: names of flags that are gone stand in a list of them.
        return text.find(b"\0" + flag.encode() + b"\0") >= 0


def set_xla_flags() -> None:
    """What the user has not set."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        flags += " --xla_force_host_platform_device_count=8"
    if "xla_backend_optimization_level" not in flags and os.environ["JAX_PLATFORMS"] == "cpu":
        flags += " --xla_backend_optimization_level=0"
        if known("xla_cpu_use_fusion_emitters"):
            flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = flags


set_xla_flags()

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
