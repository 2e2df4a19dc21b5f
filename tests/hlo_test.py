"""Counts in the text of compiled programs are those of the program that was written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import limit
from polgrad import hlo

ASYNC = """HloModule m

%cond (p: (s32[], f32[8,64])) -> pred[] {
  %p = (s32[], f32[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %p = (s32[], f32[8,64]{1,0}) parameter(0)
  %x = f32[8,64]{1,0} get-tuple-element(%p), index=1
  %start = (f32[2,64]{1,0}, f32[8,64]{1,0:S(1)}) all-gather-start(%x), replica_groups=[2,4]<=[4,2]T(1,0)
  %done = f32[8,64]{1,0} all-gather-done(%start)
  %move = f32[8,64]{1,0} collective-permute(%done), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %conv = f32[8,16]{1,0} convolution(%done, %w), dim_labels=bf_io->bf
  %w = f32[64,16]{1,0} constant({...})
  ROOT %t = (s32[], f32[8,64]{1,0}) tuple(%i, %move)
}

ENTRY %main (x: f32[8,64]) -> f32[8,64] {
  %x = f32[8,64]{1,0} parameter(0)
  %t = (s32[], f32[8,64]{1,0}) tuple(%zero, %x)
  %loop = (s32[], /*index=1*/f32[8,64]{1,0}) while(%t), condition=%cond, body=%body
  ROOT %y = f32[8,64]{1,0} get-tuple-element(%loop), index=1
}
"""


STEP = """HloModule m

%bitcast_only (p: s8[4,128]) -> s8[512] {
  %p = s8[4,128]{1,0:T(4,128)(4,1)} parameter(0)
  ROOT %b = s8[512]{0} bitcast(%p)
}

%looked_up (table: bf16[1000,128], row: s32[]) -> bf16[1,128] {
  %table = bf16[1000,128]{1,0:T(8,128)(2,1)} parameter(0)
  %row = s32[] parameter(1)
  ROOT %one = bf16[1,128]{1,0} dynamic-slice(%table, %row, %zero), dynamic_slice_sizes={1,128}
}

%product (w: s8[4,128], x: f32[8,4]) -> f32[8,128] {
  %w = s8[4,128]{1,0:T(4,128)(4,1)} parameter(0)
  %x = f32[8,4]{1,0} parameter(1)
  %same = s8[512]{0} fusion(%w), kind=kLoop, calls=%bitcast_only
  ROOT %y = f32[8,128]{1,0:S(1)} convolution(%x, %same), dim_labels=bf_io->bf
}

%turned (p: bf16[2,64,256]) -> bf16[2,256,64] {
  %p = bf16[2,64,256]{2,1,0:T(8,128)} parameter(0)
  ROOT %t = bf16[2,256,64]{2,1,0:T(8,128)} transpose(%p), dimensions={0,2,1}
}

%cond (s: (s32[], bf16[2,64,256])) -> pred[] {
  %s = (s32[], bf16[2,64,256]{2,1,0:T(8,128)}) parameter(0)
  ROOT %go = pred[] constant(true)
}

%body (s: (s32[], bf16[2,64,256])) -> (s32[], bf16[2,64,256]) {
  %s = (s32[], bf16[2,64,256]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %cache = bf16[2,64,256]{2,1,0:T(8,128)} get-tuple-element(%s), index=1
  %new = bf16[2,64,1]{2,1,0:S(1)} constant({...})
  %written = bf16[2,64,256]{2,1,0:T(8,128)} dynamic-update-slice(%cache, %new, %i, %i, %i)
  %table = bf16[1000,128]{1,0:T(8,128)(2,1)} constant({...})
  %row = bf16[1,128]{1,0:S(1)} fusion(%table, %i), kind=kLoop, calls=%looked_up
  %w = s8[4,128]{1,0:T(4,128)(4,1)} constant({...})
  %near = (s8[4,128]{1,0:T(4,128)(4,1)S(1)}, s8[4,128]{1,0:T(4,128)(4,1)}, u32[]{:S(2)}) copy-start(%w)
  %x = f32[8,4]{1,0:S(1)} constant({...})
  %y = f32[8,128]{1,0:S(1)} fusion(%w, %x), kind=kOutput, calls=%product
  %bad = bf16[2,256,64]{2,1,0:T(8,128)} fusion(%written), kind=kLoop, calls=%turned
  ROOT %t = (s32[], bf16[2,64,256]{2,1,0:T(8,128)}) tuple(%i, %written)
}

ENTRY %main (c: bf16[2,64,256]) -> (s32[], bf16[2,64,256]) {
  %c = bf16[2,64,256]{2,1,0:T(8,128)} parameter(0)
  %n = s32[] constant(0)
  %s = (s32[], bf16[2,64,256]{2,1,0:T(8,128)}) tuple(%n, %c)
  ROOT %loop = (s32[], bf16[2,64,256]{2,1,0:T(8,128)}) while(%s), condition=%cond, body=%body
}
"""


def mesh():
  return jax.make_mesh(
    (2, 2, 2),
    ('data', 'fsdp', 'tensor'),
    axis_types=(AxisType.Auto,) * 3,
    devices=jax.devices()[:8],
  )


def layers(x, w):
  return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])


def test_products_of_a_scanned_layer_count_once_a_layer():
  x, w = jax.ShapeDtypeStruct((8, 64), jnp.float32), jax.ShapeDtypeStruct((5, 64, 64), jnp.float32)
  text = jax.jit(layers).lower(x, w).compile().as_text()
  assert hlo.product_flops(text) == 5 * 2 * 8 * 64 * 64


def test_the_products_of_a_gradient_are_those_of_its_trace():
  x, w = jax.ShapeDtypeStruct((8, 64), jnp.float32), jax.ShapeDtypeStruct((5, 64, 64), jnp.float32)
  for function, taken in ((layers, 3), (jax.checkpoint(layers), 4)):
    # Forward, and in the backward pass for inputs and for weights; and what is computed again.
    traced = jax.make_jaxpr(jax.value_and_grad(function, argnums=1))(x, w)
    flops = sum(times * product.flops() for product, times in limit.products(traced.jaxpr))
    assert flops == taken * 5 * 2 * 8 * 64 * 64
  heads = jax.make_jaxpr(lambda q, k: jnp.einsum('bqhd,bkhd->bhqk', q, k))
  [(product, _)] = limit.products(heads(jnp.ones((2, 3, 4, 8)), jnp.ones((2, 5, 4, 8))).jaxpr)
  assert product.flops() == 2 * (2 * 4) * 3 * 5 * 8
  assert product.program()().shape in {(2, 4, 3, 5), (2, 4, 5, 3)}


def test_collectives_have_the_axes_and_bytes_of_what_was_written():
  def program(x):
    def body(total, _):
      found = jax.lax.psum(total, 'tensor')
      gathered = jax.lax.all_gather(found, 'fsdp', tiled=True)
      return total + jnp.mean(gathered) + jnp.mean(jax.lax.psum(x, ('data', 'fsdp'))), None

    return jax.lax.scan(body, x, length=3)[0]

  one = mesh()
  spec = PartitionSpec(('data', 'fsdp', 'tensor'))
  run = jax.jit(jax.shard_map(program, mesh=one, in_specs=spec, out_specs=spec, check_vma=False))
  x = jax.ShapeDtypeStruct((8 * 32,), jnp.float32, sharding=NamedSharding(one, spec))
  found = {
    (c.kind, c.axes): c for c in hlo.collectives(run.lower(x).compile().as_text(), one.shape)
  }
  assert found['all-reduce', 'tensor'].moved == 3 * 2 * 32 * 4 * 1 / 2
  assert found['all-gather', 'fsdp'].moved == 3 * 64 * 4 * 1 / 2
  # The compiler may lift the reduction of x, which is the same in every trip, out of the loop.
  both = found['all-reduce', 'data+fsdp']
  assert both.moved == both.count * 2 * 32 * 4 * 3 / 4


def test_asynchronous_collectives_and_convolutions_of_a_tpu():
  found = hlo.collectives(ASYNC, {'fsdp': 4, 'tensor': 2})
  gather, move = found if found[0].kind == 'all-gather' else found[::-1]
  # The ids of a group are 0, 2, 4, 6: the devices differ in fsdp.
  assert gather == hlo.Collective('all-gather', 'fsdp', 5, 5 * 8 * 64 * 4 * 3 / 4)
  assert move == hlo.Collective('collective-permute', 'tensor', 5, 5 * 8 * 64 * 4)
  assert hlo.product_flops(ASYNC) == 5 * 2 * 8 * 64 * 16


def test_a_collective_that_is_written_in_pieces_counts_once():
  """A TPU does a part of an all-gather in each trip of a loop that computes something else."""
  start = '  %x = f32[8,64]{1,0} parameter(0)\n  %t ='
  piece = '  %done = f32[8,64]{1,0} all-gather-done(%start)'
  again = '  %g = f32[4,64]{1,0} all-gather(%s), channel_id=7, replica_groups=[2,4]<=[8]'
  again += ', backend_config={"async_collective_fusion_config":{}}\n'
  text = ASYNC.replace(piece, again + piece).replace(
    start, start.replace('  %t =', again.replace('%g', '%h') + '  %t =')
  )
  assert text.count('channel_id=7') == 2
  found = {(c.kind, c.axes): c for c in hlo.collectives(text, {'fsdp': 2, 'tensor': 4})}
  assert found['all-gather', 'tensor'].count == 1
  assert found['all-gather', 'tensor'].moved == 4 * 64 * 4 * 3 / 4


SCATTER = """HloModule m

%all-reduce-scatter.1 (x: bf16[8,64]) -> bf16[8,16] {
  %x = bf16[8,64]{1,0} parameter(0)
  %all-reduce.1 = bf16[8,64]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %piece = bf16[8,16]{1,0} dynamic-slice(%all-reduce.1, %zero, %place), dynamic_slice_sizes={8,16}
}

ENTRY %main (x: bf16[8,64]) -> bf16[8,16] {
  %x = bf16[8,64]{1,0} parameter(0)
  %all-gather.1 = f32[4,8]{1,0} all-gather(%y), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}
  ROOT %f = bf16[8,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # fmt: skip # noqa: E501


def test_a_tpus_fused_reduce_scatter_is_no_all_reduce_and_devices_may_be_in_another_order():
  found = hlo.collectives(SCATTER, dict(data=2, fsdp=4))
  assert found == [
    hlo.Collective('reduce-scatter', 'fsdp', 1, 3 * 8 * 16 * 2),
    hlo.Collective('all-gather', 'data+fsdp', 1, 4 * 8 * 4 * 3 / 4),
  ]


def test_windows_that_reach_into_padding_are_no_operations():
  """Products as a TPU writes them, where a dimension of a result is one of the window."""
  text = """HloModule m

ENTRY %main (p: bf16[16384,2,64], q: bf16[16,128,16384]) -> f32[2,64,16,128] {{
  %p = bf16[{lhs}]{{2,1,0}} parameter(0)
  %q = bf16[{rhs}]{{2,1,0}} parameter(1)
  ROOT %conv = f32[{out}]{{3,2,1,0}} convolution(%p, %q), window={{{window}}}, dim_labels={labels}
}}
"""
  flops = lambda **fields: hlo.product_flops(text.format(**fields))
  assert flops(
    lhs='16384,2,64,1', rhs='16,128,16384,1', out='2,64,16,128',
    window='size=1x16 pad=0_0x15_15 rhs_reversal=0x1', labels='f0b1_1oi0->0b1f',
  ) == 2 * (2 * 64) * (16 * 128) * 16384  # fmt: skip
  # A dimension that is summed over, and a batch dimension by a dilated input.
  assert flops(
    lhs='8,2,64', rhs='2,64,32', out='8,32,1', window='size=2', labels='b0f_0io->bf0'
  ) == 2 * 8 * 32 * 128  # fmt: skip
  assert flops(
    lhs='8,4,64', rhs='4,64,32', out='8,4,32',
    window='size=4 stride=3 pad=0_0 lhs_dilate=4', labels='b0f_0io->b0f',
  ) == 2 * 8 * 4 * 64 * 32  # fmt: skip


def test_a_loop_that_the_compiler_unrolled_has_fewer_trips():
  unrolled = ASYNC.replace(
    '  ROOT %t = (s32[], f32[8,64]{1,0}) tuple(%i, %move)',
    """  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[] add(%i, %two), metadata={op_name="x"}
  ROOT %t = (s32[], f32[8,64]{1,0}) tuple(%next, %move)""",
  )
  newer = unrolled.replace('compare(%i, %n)', 'compare(%p#0, %n)')
  newer = newer.replace('  %i = s32[] get-tuple-element(%p), index=0\n', '', 1)
  assert len({ASYNC, unrolled, newer}) == 3
  for text in (unrolled, newer):
    assert hlo.product_flops(text) == 3 * 2 * 8 * 64 * 16  # counters 0, 2 and 4 are below 5


def test_a_step_reads_a_looked_up_row_and_writes_a_column_in_place():
  found = hlo.main_memory(STEP, large=2**10)
  cache, turned = 2 * 64 * 256 * 2, 2 * 256 * 128 * 2  # 64 columns are padded to 128
  # Indices of 4 bytes: three of the update, one of the row.
  assert found.read == 4 * 4 + 2 * 128 + 2 * 4 * 128 + cache
  assert found.written == turned  # and the column, whose tiles are not known
  assert found.copied == ("('bf16', (2, 256, 64))",)


LOOPS = """HloModule m

%below (q: (s32[], f32[8,128])) -> pred[] {
  %q = (s32[], f32[8,128]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%at, %n), direction=LT
}

%layer (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%p), index=1
  %y = f32[8,128]{1,0} negate(%x)
  ROOT %t = (s32[], f32[8,128]{1,0}) tuple(%i, %y)
}

%step (r: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %r = (s32[], f32[8,128]{1,0}) parameter(0)
  ROOT %inner = (s32[], f32[8,128]{1,0}) while(%r), condition=%below, body=%layer
}

ENTRY %main (s: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %s = (s32[], f32[8,128]{1,0}) parameter(0)
  ROOT %outer = (s32[], f32[8,128]{1,0}) while(%s), condition=%below, body=%step
}
"""


def test_layers_in_a_loop_of_decoding_count_each_for_one_step():
  found = hlo.main_memory(LOOPS)
  array, number, truth = 4 * 8 * 128, 4, 1
  compared = 3 + 1  # by the inner loop, and by the outer one
  assert found.read == 3 * array + compared * 2 * number
  assert found.written == 3 * array + compared * truth


def test_text_without_an_entry_is_refused():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.parse('HloModule m')


def test_sizes_of_all_types():
  kinds = {'pred': 1, 'bf16': 2, 'f32': 4, 's8': 1, 'f8e4m3fn': 1, 'u4': 0.5}
  np.testing.assert_array_equal(
    [hlo.size((kind, (2, 3))) for kind in kinds], [6 * n for n in kinds.values()]
  )
