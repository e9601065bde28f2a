"""bdjax's side of tools/bench_train_step.py: the real train step, compiled, on random tokens."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from kernel_profile import profile_table
from train_step_case import Contestant, Shape, timed

from bdjax import OptimConfig, presets
from bdjax.embedding import TokenEmbedding
from bdjax.flops import Flops, scored_share, step_flops
from bdjax.likelihood import to_device
from bdjax.model import DecoderConfig, Remat
from bdjax.objective import Objective
from bdjax.optim import Optimiser, make_optimiser
from bdjax.readout import TokenReadout
from bdjax.sharding import make_mesh
from bdjax.step import Model
from bdjax.train_step import initial_state, train_step


def program(shape: Shape, remat: str) -> tuple[Objective, Model, Optimiser]:
    """The static arguments of `train_step`: exact counts, float32 masters, bf16 compute, AdamW."""
    recipe = presets.default(
        mask_id=shape.mask_id, block_size=shape.block, ar_weight=shape.ar_weight
    )
    decoder = DecoderConfig(
        num_layers=shape.layers,
        width=shape.width,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        mlp_width=shape.mlp,
        clean=recipe.clean,
        rope_theta=shape.rope_theta,
        qk_norm=True,
        tied_head=True,
        remat=Remat(remat),
        unroll=min(shape.unroll, shape.layers),
    )
    model = Model(
        decoder=decoder,
        embedding=TokenEmbedding(vocab_size=shape.vocab, width=shape.width, dtype=decoder.dtype),
        readout=TokenReadout(
            vocab_size=shape.vocab, width=shape.width, tied=True, banned=(shape.mask_id,)
        ),
    )
    return recipe.objective, model, make_optimiser(OptimConfig(), model.table(), total_steps=1000)


def flops(shape: Shape, remat: str, rows: int) -> Flops:
    """Model FLOPs of a step, the same for every contestant but for what it computes twice."""
    objective, model, _ = program(shape, remat)
    share = scored_share(objective, shape.block)
    return step_flops(model, objective, [shape.length] * rows, block_size=shape.block, share=share)


def random_rows(shape: Shape, rows: int) -> dict[str, np.ndarray]:
    """One document per row of tokens that are never the mask token; BOS is not scored."""
    position = np.tile(np.arange(shape.length, dtype=np.int32), (rows, 1))
    tokens = np.random.default_rng(0).integers(0, shape.mask_id, position.shape, np.int32)
    return {
        "tokens": tokens,
        "segment": np.ones_like(position),
        "position": position,
        "trainable": position > 0,
    }


def measure(
    who: Contestant, shape: Shape, *, steps: int, samples: int, profile: Path | None = None
) -> dict:
    """Times the step; with `profile`, also traces two steps into that folder and prints them."""
    with jax.set_mesh(make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])):
        objective, model, optimiser = program(shape, who.remat)
        batch, root = to_device(random_rows(shape, who.rows)), jax.random.key(0)
        state = initial_state(0, model, optimiser)
        begin = time.perf_counter()
        lowered = train_step.lower(objective, model, optimiser, state, batch, root)
        compiled = lowered.compile()
        compile_seconds = time.perf_counter() - begin
        first_loss = None

        def step():
            nonlocal state, first_loss
            state, metrics = compiled(state, batch, root)
            first_loss = metrics["loss"] if first_loss is None else first_loss
            return metrics["loss"]

        found = timed(step, jax.block_until_ready, steps=steps, samples=samples)
        if profile is not None:
            jax.profiler.start_trace(str(profile))
            step()
            jax.block_until_ready(step())
            jax.profiler.stop_trace()
            print(profile_table(profile, compiled.as_text(), steps=2), flush=True)
    device = jax.devices()[0]
    memory = compiled.memory_analysis()
    planned = memory and memory.argument_size_in_bytes + memory.temp_size_in_bytes
    parameters = jax.tree.leaves(state.params)
    moments = {str(x.dtype) for x in jax.tree.leaves(state.optimiser.inner) if x.ndim}
    return found | {
        "device": device.device_kind,
        "versions": {"jax": jax.__version__},
        "compile_seconds": compile_seconds,
        "first_loss": float(first_loss),
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "planned_bytes": planned,
        "parameters": sum(x.size for x in parameters),
        "dtypes": {
            "parameters": str(jnp.result_type(*parameters)),
            "moments": "+".join(sorted(moments)),
            "compute": model.decoder.dtype,
        },
    }
