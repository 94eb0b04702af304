"""Reading compiled programs: written by hand with known answers, and one of the compiler's own."""

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.training.compiled import Collective, LargeArray, Program

BY_HAND = """HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%a, %b)
}

%fused (p.0: f32[1000,1000]) -> f32[1000,1000] {
  %p.0 = f32[1000,1000]{1,0:T(8,128)} parameter(0)
  %never = f32[9000,9000]{1,0:T(8,128)} broadcast(%p.0)
  %shard = bf16[16,100]{1,0:T(8,128)(2,1)} slice(%p.0)
  ROOT %all-gather.5 = bf16[64,100]{1,0:T(8,128)(2,1)} all-gather(%shard), replica_groups={{0,1}}, dimensions={0}
}

%body (s: (s32[], f32[16,10])) -> (s32[], f32[16,10]) {
  %s = (s32[]{:T(128)}, f32[16,10]{1,0:T(8,128)}) parameter(0)
  %x = f32[16,10]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %r = (f32[16,10]{1,0:T(8,128)}, f32[16,10]{1,0:T(8,128)}) all-reduce(%x, %x), replica_groups=mesh['a'=4] {'a','b'}
  ROOT %t = (s32[]{:T(128)}, f32[16,10]{1,0:T(8,128)}) tuple(%i, %x)
}

%condition (s: (s32[], f32[16,10])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[16,10]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (state: f32[4,16,10]) -> f32[16,10] {
  %state = f32[4,16,10]{2,1,0:T(8,128)} parameter(0), metadata={op_name="state.params[\\'head\\']"}
  %start = (f32[16,10]{1,0:T(8,128)}, f32[64,10]{1,0:T(8,128)}) all-gather-start(%x.1), replica_groups={{0,1,2,3}}
  %x.1 = f32[16,10]{1,0:T(8,128)} copy(%state), metadata={op_name="jit(step)/copy"}
  %done = f32[64,10]{1,0:T(8,128)} all-gather-done(%start)
  %near = f32[32,1000]{1,0:T(8,128)S(1)} copy(%done)
  %f = bf16[64,100]{1,0:T(8,128)(2,1)} fusion(%x.1), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/gather"}
  %loop = (s32[]{:T(128)}, f32[16,10]{1,0:T(8,128)}) while(%t.0), condition=%condition, body=%body
  ROOT %scattered = f32[2,10]{1,0:T(2,128)} reduce-scatter(%x.1), replica_groups={{0,1}}, dimensions={0}, to_apply=%sum
}
"""
ROW = 128 * 4  # a row of 10 float32 fills a whole row of a tile


def test_collectives_of_a_program_written_by_hand():
    gathered = 64 * ROW + 64 * 128 * 2  # the one at the top, the larger side; and the one in a fusion
    assert Program(BY_HAND).collectives() == [
        Collective("all-reduce", "a,b", 12, 12 * 2 * 16 * ROW),
        Collective("all-gather", "", 2, gathered),
        Collective("reduce-scatter", "", 1, 16 * ROW),
    ]


def test_largest_arrays_of_a_program_written_by_hand():
    """Not those within fusions, in on-chip memory, or that are parts of others."""
    found = Program(BY_HAND).largest(4)
    assert found[:2] == [
        LargeArray("f32[4,16,10]", 4 * 16 * ROW, 1, "state.params['head']"),
        LargeArray("f32[64,10]", 64 * ROW, 1, "all-gather-done"),
    ]
    assert LargeArray("bf16[64,100]", 64 * 128 * 2, 1, "jit(step)/gather") in found
    assert len(found) == 4


def test_a_scan_on_several_devices():
    """XLA's own text on the CPU: a sum over devices in each round of a loop."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])

    def step(x, w):
        def body(carry, row):
            return carry + jax.lax.psum(row * carry.sum(), "data"), None

        return jax.lax.scan(body, w, x)[0]

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(jax.P(None, "data"), jax.P()), out_specs=jax.P())
    text = jax.jit(mapped).lower(np.ones((7, 4 * 32), np.float32), jnp.ones(32)).compile().as_text()
    (found,) = Program(text or "").collectives()
    assert (found.kind, found.times, found.bytes) == ("all-reduce", 7, 7 * 32 * 4)
