"""What is read out of a compiled program's text besides its collectives (those: test_plan.py)."""

import jax
import jax.numpy as jnp

from bdjax.hlo import Buffer, estimated_cycles, largest_buffers, mosaic_calls

ESTIMATE = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
KERNEL = 'custom-call(%%p), custom_call_target="tpu_custom_call", metadata={op_name="bf16[9999]"}'
PROGRAM = f"""\
HloModule example

%body (j: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %j = (s32[], f32[8]) parameter(0)
  %g = f32[8]{{0}} get-tuple-element(%j), index=1
  %attention.3 = bf16[2,64,8]{{2,1,0:T(8,128)(2,1)S(1)}} {KERNEL}
  %copy.1 = f32[8]{{0}} copy(%g), {ESTIMATE % 10}
  ROOT %t = (s32[], f32[8]) tuple(%g, %g)
}}

%condition (i: (s32[], f32[8])) -> pred[] {{
  %i = (s32[], f32[8]) parameter(0)
  ROOT %lt = pred[] compare(%i, %i), direction=LT
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  %attention.4 = (f8e4m3fn[512]{{0}}, u32[]) {KERNEL}
  %other.clone.1 = f32[4,4] {KERNEL}
  %no = f32[4,4] custom-call(%p), custom_call_target="ConcatBitcast"
  %w = (s32[], f32[8]) while(%p), condition=%condition, body=%body, known_trip_count={{"n":"5"}}
  %x = f32[8]{{0}} negate(%p), {ESTIMATE % (2**63 - 1)}
  ROOT %y = f32[8]{{0}} negate(%p), {ESTIMATE % 3}
}}
"""


def test_kernels_are_counted_as_often_as_they_run():
    assert mosaic_calls(PROGRAM) == {"attention": 6, "other": 1}


def test_cycles_are_added_up_over_loops_and_what_is_no_estimate_is_none():
    assert estimated_cycles(PROGRAM) == 5 * 10 + 3


def test_buffers_of_a_size_are_found_in_tuples_with_layouts_and_of_any_type():
    assert largest_buffers(PROGRAM, 16)[1:] == [
        Buffer("bf16", (2, 64, 8)),
        Buffer("f8e4m3fn", (512,)),
        Buffer("f32", (4, 4)),
    ]
    # Text that looks like an array counts as one: a test that asserts absence errs to its side.
    assert largest_buffers(PROGRAM, 16)[0] == Buffer("bf16", (9999,))


def test_a_square_of_a_compiled_program_is_found():
    x = jax.ShapeDtypeStruct((96, 4), jnp.float32)

    def text(function):
        return jax.jit(function).lower(x).compile().as_text()

    assert largest_buffers(text(lambda x: jnp.sin(x @ x.T) @ x), 96 * 96)
    assert not largest_buffers(text(lambda x: jnp.sin(x.T @ x) @ x.T), 96 * 96)
