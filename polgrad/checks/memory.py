"""How many bytes the arrays of a run take on one device; nothing is allocated."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from polgrad import sharding
from polgrad.checks import tracing
from polgrad.models import cache as caches
from polgrad.models.policy import Policy, learned
from polgrad.models.token_stats import LOGITS
from polgrad.sampling import engines


class Use(NamedTuple):
  """The arrays of one kind."""

  name: str
  total: int  # bytes, over all devices, of one copy
  device: int  # bytes on the device that has most of them
  # 'always', 'update', 'rollout', 'credit', on devices that do not train 'beside', and in the memory of
  # the host of every process 'host'
  when: str


def use(name: str, shapes: Any, shardings: Any, when: str = 'always') -> Use:
  """The bytes of a pytree of shapes, each with its sharding."""
  total = device = 0
  for x, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True):
    total += math.prod(x.shape) * x.dtype.itemsize
    device += math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
  return Use(name, total, device, when)


def of_phase(
  phase: Any,
  policy: Policy,
  mesh: jax.sharding.Mesh,
  opt_shardings: Callable[..., Any],
  sampler_mesh: jax.sharding.Mesh | None = None,
  responses: Any = (),
  engine: engines.Own | engines.External = engines.OWN,
) -> list[Use]:
  """The arrays that a phase holds, apart from the activations between its layers.

  Args:
    opt_shardings: (optimizer, mesh, parameters) -> the shardings of the optimizer's state.
    sampler_mesh: the devices that sample, if they do not train.
    responses: the first `TrainState.responses` of the phase.
    engine: what samples.
  """
  own = lambda policy: _placed(policy, mesh)
  params, trainable = own(policy), learned(policy, own(policy))
  places = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  state = jax.eval_shape(phase.optimizer.init, trainable)
  found = [
    use('parameters', params, places(params)),
    use('optimizer', state, opt_shardings(phase.optimizer, mesh, trainable)),
  ]
  for name in phase.anchors:
    tree = own(phase.frozen[name]) if name in phase.frozen else trainable
    found.append(use(f'anchor {name}', tree, places(tree)))
  for name, one in {**phase.learned, **phase.further}.items():
    state = jax.eval_shape(one.optimizer.init, trainable)
    placed = opt_shardings(one.optimizer, mesh, trainable)
    found.append(use(f'optimizer of {name}', state, placed))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  everywhere = lambda tree: jax.tree.map(lambda x: whole, tree)
  # What is carried over steps, such as rows to train on again, and counts of every data row.
  for name in ('collect', 'credit', 'objective'):
    state = getattr(phase, name).init()
    found.append(use(f'state of {name}', state, everywhere(state)))
  state = phase.curriculum.init(phase.source)
  found.append(use('state of curriculum', state, everywhere(state)))
  found.append(use('responses', responses, everywhere(responses), 'host'))
  for name, one in phase.network_learners(policy).items():
    shapes = one.shapes()
    state = jax.eval_shape(one.optimizer.init, one.trained(shapes))
    found.append(use(f'network {name}', (shapes, state), everywhere((shapes, state))))
  # Gradients add up in float32 over micro-batches.
  wide = lambda x: x.update(dtype=jnp.float32) if phase.micro_batches > 1 else x
  grads = jax.tree.map(wide, trainable)
  found.append(use('gradients', grads, places(trainable), 'update'))
  if phase.credit.contrasts is not None:  # a gradient of each reward, all at the same time
    number = tracing.batch_shapes(phase, phase.collect.rows)['influences'].shape[1]
    found.append(
      use('gradients of rewards', [grads] * number, [places(trainable)] * number, 'credit')
    )
  found.append(logits(phase, policy, mesh))
  if hasattr(phase.collect, 'max_new_tokens'):
    found += of_sampler(phase, policy, mesh, sampler_mesh, engine)
  return [one for one in found if one.total]


def of_sampler(
  phase: Any,
  policy: Policy,
  mesh: jax.sharding.Mesh,
  sampler_mesh: jax.sharding.Mesh | None,
  engine: engines.Own | engines.External,
) -> list[Use]:
  """What sampling holds, see `of_phase`; an external engine has its caches and weights elsewhere."""
  collect, sampled_on = phase.collect, sampler_mesh or mesh
  when = 'beside' if sampler_mesh else 'always' if collect.overlaps else 'rollout'
  places = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  found = []
  if isinstance(engine, engines.Own):
    prompts = getattr(collect, 'in_flight', 0) or collect.records
    rows = getattr(collect, 'slots', 0) or prompts * collect.samples_per_prompt
    drafts = {f' of {n}': phase.frozen.get(n, policy) for n in getattr(collect, 'drafts', ())}
    for name, model in {'': policy, **drafts}.items():
      cache = kv_cache(engine.drawn_from(model), sampled_on, rows, collect.length)
      found.append(cache._replace(name=f'KV cache{name}', when=when))
    read = unstacked(engine.drawn_from(policy), sampled_on)
    found.append(use('weights of decoding', read, places(read), when))
  if sampler_mesh or collect.overlaps:
    copy = sent(engine, policy, sampled_on)
    found.append(use('sampler parameters', copy, places(copy), when))
  return found


def _placed(policy: Policy, mesh: jax.sharding.Mesh) -> Any:
  """The shapes of the parameters with their shardings."""
  shapes = policy.shapes()
  return _laid_on(mesh, policy.axes(shapes), shapes)


def _laid_on(mesh: jax.sharding.Mesh, axes: Any, shapes: Any) -> Any:
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    sharding.param_shardings(mesh, axes, shapes),
  )


def sent(engine: engines.Own | engines.External, policy: Policy, mesh: jax.sharding.Mesh) -> Any:
  """The shapes of the parameters that a sampler on other devices gets, with their shardings."""
  shapes = policy.shapes()
  return _laid_on(mesh, policy.axes(shapes), jax.eval_shape(engine.rounded(policy), shapes))


def unstacked(policy: Policy, mesh: jax.sharding.Mesh) -> Any:
  """The shapes of the parameters as decoding reads them, with the shardings of the stacks."""
  shapes = policy.shapes()
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    axes, flat = policy.axes(shapes), jax.eval_shape(policy.unstack, shapes)
  axes['layers'] = (axes['layers'],) * len(flat['layers'])
  return _laid_on(mesh, axes, flat)


def logits(phase: Any, policy: Policy, mesh: jax.sharding.Mesh) -> Use:
  """The logits that an update has in memory at a time, and their gradient, in float32."""
  vocabulary, devices = policy.config.vocab_size, sharding.data_parallel_size(mesh)
  rows = phase.collect.rows // (phase.minibatches * phase.micro_batches * devices)
  pieces = sharding.shards('length', phase.collect.length, mesh)
  columns = (phase.collect.length - max(phase.layout.prompt_length - 1, 0)) // pieces
  tokens = min(rows * columns, max(rows, LOGITS // vocabulary))
  each = 2 * 4 * tokens * vocabulary
  split = sharding.shards('vocab', vocabulary, mesh)
  return Use('logits', each * devices * pieces, each // split, 'update')


def kv_cache(policy: Policy, mesh: jax.sharding.Mesh, rows: int, length: int) -> Use:
  """The keys and values of the rows that are decoded at a time."""
  devices = sharding.data_parallel_size(mesh)
  rows = -(-rows // devices) * devices
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    (span,) = jax.eval_shape(lambda: policy.init_cache(rows, length)).spans
  place = lambda axes, x: jax.sharding.NamedSharding(
    mesh, sharding.partition_spec(mesh, axes, x.shape)
  )
  specs = (caches.KEYS, span.keys), (caches.VALUES, span.values)
  places = [caches.each(place, axes, x) for axes, buffers in specs for x in buffers]
  return use('KV cache', (span.keys, span.values), places, 'rollout')


def peak(uses: list[Use]) -> int:
  """The most bytes that a device that trains holds of these arrays at a time."""
  held = lambda when: sum(one.device for one in uses if one.when == when)
  return held('always') + max(held('update'), held('rollout'), held('credit'))
