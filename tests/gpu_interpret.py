"""Mosaic GPU kernels on the CPU: jax's interpreter, which runs the barriers and finds races, with
the tensor core's products put in its place.

The interpreter knows no accumulators that are carried (`pl.run_state`) and no operand in
registers. While a kernel is traced here, an accumulator is a plain value or a buffer, a product is
added to it at once, and layouts, which the interpreter does not model, are left out. A warpgroup's
reads are ordered before what copies write after it frees a buffer.
"""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax._src.state.types import TransformedRef
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Warpgroups, rows and columns: room for every kernel's accumulator.
_ACCUMULATORS = (4, 128, 256)


class _Accumulator:
    """Shape while it is declared, value inside the body that uses it."""

    def __init__(self, shape, dtype=jnp.float32):
        self.shape, self.value = shape, None

    def __getitem__(self, index):
        assert index is ...
        return self.value

    @staticmethod
    def init(value):
        held = _Accumulator(value.shape)
        held.value = value
        return held


class _Transposed:
    def __init__(self, ref):
        self._ref = ref

    def __getitem__(self, index):
        return self._ref[index].T


def _read(operand):
    return operand if isinstance(operand, jax.Array) else operand[...]


def _wgmma(accumulator, a, b):
    product = jnp.dot(
        _read(a).astype(jnp.float32), _read(b).astype(jnp.float32), precision="highest"
    )
    # The tensor core reads through the proxy that copies write through: no fence is between them.
    plgpu.commit_smem()
    if isinstance(accumulator, _Accumulator):
        accumulator.value = accumulator.value + product
    else:
        accumulator[...] += product


def _run_state(body):
    def run(held):
        many = isinstance(held, tuple)
        body(held)
        return tuple(h.value for h in held) if many else held.value

    return run


def _run_scoped(real):
    """A declared accumulator is a buffer of its warpgroup where a kernel declares its own shared
    memory, so that loops may close over it; elsewhere, or with others, it is a value.

    The interpreter knows shared allocations alone. One that all warpgroups make gets another beside
    it, of which every warpgroup has an accumulator's share.
    """
    shares = []

    def run(body, *types, **options):
        if any(isinstance(t, _Accumulator) for t in types):
            if len(types) > 1 or not shares:
                zeros = (jnp.zeros(t.shape, jnp.float32) for t in types)
                return body(*(_Accumulator.init(zero) for zero in zeros))
            ((buffer, thread),), shape = shares, types[0].shape
            share = buffer.at[lax.axis_index(thread), : shape[0], : shape[1]]
            # A zero that is traced: kernels close over no arrays.
            zero = (lax.axis_index(thread) * 0).astype(jnp.float32)
            share[...] = lax.broadcast_in_dim(zero, shape, ())
            return body(share)
        if options.get("collective_axes") is None or shares:
            return real(body, *types, **options)

        def with_shares(buffer, *refs):
            shares.append((buffer, options["collective_axes"]))
            try:
                return body(*refs)
            finally:
                shares.pop()

        return real(with_shares, plgpu.SMEM(_ACCUMULATORS, jnp.float32), *types, **options)

    return run


def _copy_out(real):
    """The interpreter has no copies that add."""

    def copy(source, target, *, reduction_op=None, **options):
        if reduction_op is not None:
            assert reduction_op == "add"
            source[...] += target[...]
            plgpu.commit_smem()
        real(source, target, **options)

    return copy


@contextlib.contextmanager
def interpreted(detect_races: bool = True):
    """Kernels traced inside run in the interpreter; a race in one of them fails the test."""
    params = InterpretGPUParams(detect_races=detect_races)
    kernel, over_mesh, arrive = plgpu.kernel, pl.kernel, plgpu.barrier_arrive

    def ordered_arrive(barrier):
        plgpu.commit_smem()
        arrive(barrier)

    # Named otherwise from jax 0.11 on.
    name = "GPURaceDetectionState"
    name = name if hasattr(gpu_callbacks, name) else "RaceDetectionState"
    detector, states = getattr(gpu_callbacks, name), []

    def detect(**options):
        states.append(detector(**options))
        return states[-1]

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(gpu_callbacks, name, detect))
        for module, name, new in (
            (plgpu, "kernel", lambda *args, **options: kernel(*args, **options, interpret=params)),
            (pl, "kernel", lambda *args, **options: over_mesh(*args, **options, interpret=params)),
            (plgpu, "barrier_arrive", ordered_arrive),
            (plgpu, "ACC", _Accumulator),
            (plgpu, "wgmma", _wgmma),
            (plgpu, "wgmma_wait", lambda allowed: None),
            (plgpu, "wgmma_accumulator_load", lambda held, wait_n: held.value),
            (plgpu, "layout_cast", lambda x, layout: x),
            (plgpu, "load", lambda ref, index=(), **options: ref[...]),
            (TransformedRef, "transpose", lambda ref, order: _Transposed(ref)),
            (
                plgpu,
                "broadcasted_iota",
                lambda dtype, shape, axis, **options: lax.broadcasted_iota(dtype, shape, axis),
            ),
            (plgpu, "copy_smem_to_gmem", _copy_out(plgpu.copy_smem_to_gmem)),
            (pl, "run_state", _run_state),
            (pl, "run_scoped", _run_scoped(pl.run_scoped)),
        ):
            stack.enter_context(mock.patch.object(module, name, new, create=True))
        yield
        jax.effects_barrier()
    assert states or not detect_races, "no kernel ran under the race detector"
    assert not any(state.races_found for state in states), "the interpreter found a race"
