"""The programs of a run, compiled ahead of time for the chips of a TPU topology that is not there.

`plan` lists them with what can be counted by hand, `compiled` compiles one and counts in the result.
Nothing runs, and no weights are needed. docs/preflight.md explains the numbers.
"""

import collections
import dataclasses
import functools
import math
import os
import re
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from polgrad import build, hlo, phases, sharding, speed
from polgrad.checks import memory, tracing
from polgrad.learner import Learner, forward_in_pieces
from polgrad.models import cache as caching
from polgrad.models.policy import Policy, learned
from polgrad.models.token_stats import exchanged, sharing
from polgrad.sampling import engines, resumable
from polgrad.sampling import sampler as sampling
from polgrad.sampling.decoding import Sampler
from polgrad.types import PLAIN, Batch, Layout


class Chip(NamedTuple):
  """What a chip has, as Google publishes it."""

  memory: float  # bytes
  bandwidth: float  # bytes a second, of its memory
  links: float  # bytes a second, over all its links to other chips


# By words of `device_kind`; operations a second are in `speed.PEAKS`.
CHIPS = {
  'TPU v4': Chip(32 * 2**30, 1228e9, 300e9),
  'TPU v5 lite': Chip(16 * 2**30, 819e9, 200e9),
  'TPU v5': Chip(95 * 2**30, 2765e9, 600e9),
  'TPU v6 lite': Chip(32 * 2**30, 1640e9, 448e9),
}


class Counts(NamedTuple):
  """What a program must do on one chip, counted by hand."""

  flops: float
  bytes: float  # of memory that must be read and written
  least_moved: float  # bytes that must be received from other chips


class Planned(NamedTuple):
  """A program of a run, before it is compiled."""

  name: str
  times: float  # how often it runs in a step
  mesh: Any
  function: Any  # jitted; None: the program only copies parameters
  arguments: tuple  # shapes with their shardings
  counts: Counts
  resident: float = 0.0  # bytes that a chip holds meanwhile, besides the arguments
  # Programs whose steps it runs, and how often; what moves is counted in these, because the number of
  # trips of its loops is not in the text.
  parts: Mapping[str, float] = types.MappingProxyType({})


class Program(NamedTuple):
  """What is known of one compiled program, on one chip."""

  name: str
  memory: (
    float  # bytes that it holds at most: arguments, results, temporary arrays, what is resident
  )
  temporary: float  # bytes of the temporary arrays
  flops: float  # counted by hand
  compiled_flops: float  # of products in the compiled program; those in kernels are not seen
  bytes: float  # of memory that must be read and written, counted by hand
  collectives: list[hlo.Collective]
  least_moved: float  # bytes that must be received from other chips, counted by hand
  seconds: float  # of compilation
  error: str = ''  # of the compiler
  times: float = 1.0  # how often it runs in a step
  chips: int = 1

  @property
  def moved(self) -> float:
    """Bytes received from other chips; the least where the compiled program could not be read."""
    if math.isnan(self.compiled_flops):
      return self.least_moved
    return sum(one.moved for one in self.collectives)


class Bound(NamedTuple):
  """The least time of a program, and why."""

  seconds: float
  limit: str  # 'products', 'memory' or 'links'
  mfu: float  # the fraction of the peak that is reached in this time


def bound(program: Program, chip: Chip, peak: float) -> Bound:
  """The longest of the times for products, memory and links, as if each overlapped the others.

  >>> one = Program('update', 0, 0, 100.0, 0, 10.0, [], 0, 0)
  >>> bound(one, Chip(0, 1.0, 1.0), 20.0)
  Bound(seconds=10.0, limit='memory', mfu=0.5)
  """
  times = {
    'products': program.flops / peak,
    'memory': program.bytes / chip.bandwidth,
    'links': program.moved / chip.links,
  }
  limit = max(times, key=times.get)
  most = times[limit]
  return Bound(most, limit, program.flops / peak / most if most else 0.0)


def least_moved(
  params: float,
  mesh: dict[str, int],
  *,
  activations: float,
  update: bool,
  once: float = 0.0,
  trained: float | None = None,
) -> float:
  """Bytes that a chip must receive when parameters are sharded by `sharding.RULES`.

  Over fsdp, context and expert the parameters are gathered, (n - 1) / n of them; an update gathers them
  again in its backward pass and scatters as many gradients, which are then added up over data. Over
  tensor, activations are added up. Experts that are spread over expert need not be gathered, and what is
  exchanged instead is not counted.

  Args:
    params: bytes of the parameters in the type of activations, without their cut over fsdp.
    activations: bytes of all activations of the forward pass that are added up over tensor.
    once: bytes of those parameters that a backward pass need not gather again: it begins with them.
    trained: bytes of those parameters that have gradients; None: all.
  """
  part = lambda n: (n - 1) / n
  trained = params if trained is None else trained
  pieces = math.prod(mesh.get(axis, 1) for axis in ('fsdp', 'context', 'expert'))
  gathered = 2 * params - once + trained if update else params
  moved = gathered * part(pieces)
  moved += (2 if update else 1) * 2 * activations * part(mesh['tensor'])
  if update:
    moved += 2 * trained / pieces * part(mesh['data'])
  return moved


def replicated(mesh: Any, shapes: Any, least: int = 2**20) -> list[str]:
  """Parameters of at least `least` bytes that no mesh axis cuts, so every device holds them whole."""
  if mesh.size == mesh.shape['data']:
    return []
  return [
    jax.tree_util.keystr(path)
    for path, x in jax.tree_util.tree_leaves_with_path(shapes)
    if math.prod(x.shape) * x.dtype.itemsize >= least and x.sharding.is_fully_replicated
  ]


def local(tree: Any) -> float:
  """Bytes of arrays on one device."""
  size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return float(sum(map(size, jax.tree.leaves(tree))))


def placed_params(policy: Policy, mesh: Any) -> Any:
  """The shapes of parameters with their shardings."""
  shapes = policy.shapes()
  return jax.tree.map(_placed, shapes, sharding.param_shardings(mesh, policy.axes(shapes), shapes))


def placed_state(phase: Any, policy: Policy, mesh: Any) -> Any:
  """The state of a phase as shapes with shardings."""
  shapes, params = tracing.state_shapes(phase, policy), placed_params(policy, mesh)
  trainable = learned(policy, params)
  anchor = lambda n: placed_params(phase.frozen[n], mesh) if n in phase.frozen else trainable
  whole = NamedSharding(mesh, PartitionSpec())
  small = functools.partial(
    jax.tree.map,
    lambda x: _placed(jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), whole),
  )
  opt = lambda optimizer, params, state: jax.tree.map(
    _placed, state, phases.opt_shardings(optimizer, mesh, params)
  )

  def other(name, one, params):
    """The entry of a learner in `TrainState.learned`."""
    entry = shapes.learned[name]
    state = opt(one.learner.optimizer, params, entry['opt_state'])
    return small({k: x for k, x in entry.items() if k != 'opt_state'}) | {'opt_state': state}

  rest = small(shapes.replace(params={}, anchors={}, opt_state=(), learned={}, responses=()))
  return rest.replace(
    params=params,
    anchors={n: anchor(n) for n in phase.anchors},
    opt_state=opt(phase.optimizer, trainable, shapes.opt_state),
    learned={n: other(n, one, anchor(n)) for n, one in phase.anchor_learners(policy).items()}
    | {n: other(n, one, trainable) for n, one in phase.further_learners(policy).items()},
  )


def plan(name: str, phase: Any, run: build.Experiment) -> list[Planned]:
  """The programs of a phase, in the order of a step."""
  planner = Planner(name, phase, run)
  found = planner.anchors() + planner.network_scores()
  # An external engine samples on its own devices, and compiles its programs itself.
  if hasattr(phase.collect, 'max_new_tokens') and not isinstance(run.engine, engines.External):
    flying = getattr(phase.collect, 'in_flight', 0)
    found = planner.transfers() + (planner.continued() if flying else planner.rollouts()) + found
  return found + planner.updates()


@dataclasses.dataclass(frozen=True, eq=False)
class Planner:
  """Lists the programs of a phase by their kinds."""

  name: str
  phase: Any
  run: build.Experiment

  @functools.cached_property
  def state(self) -> Any:
    return placed_state(self.phase, self.run.policy, self.run.mesh)

  def rows(self, parts: int, count: int = 0) -> Batch:
    """A batch of a number of rows, by default a minibatch of one of `parts`."""
    phase = self.phase
    shapes = tracing.batch_shapes(phase, count or phase.collect.rows // parts)
    place = functools.partial(by_rows, self.run.mesh)
    return jax.tree.map(place, shapes).replace(layout=phase.layout._replace(pack=0))

  def gathered(self, policy: Policy, mesh: Any) -> float:
    """Bytes of the parameters in the type of activations, without their cut over fsdp."""
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(policy.shapes()))
    return total * jnp.dtype(policy.config.dtype).itemsize / mesh.shape['tensor']

  def least(
    self,
    policy: Policy,
    mesh: Any,
    tokens: float,
    *,
    update: bool = False,
    passes: float = 1,
    statistics: bool = False,
  ) -> float:
    """`least_moved` of a model that reads a number of tokens, and its parameters `passes` times.

    Args:
      statistics: whether it computes statistics of all tokens, for which devices may share the
        vocabulary, see `token_stats`.
    """
    config = policy.config
    # Attention and feed-forward each add up one activation a layer and token over tensor.
    added = 2 * config.num_layers * tokens * config.width * jnp.dtype(config.dtype).itemsize
    shapes = policy.shapes()
    readout = policy.readout(shapes)
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
    # Embeddings of tokens are looked up where they are.
    looked_up = 0 if 'embedding' in readout else count(shapes['embedding'])
    part = passes * self.gathered(policy, mesh) / count(shapes)
    gradients = learned(policy, shapes)
    trained = count(gradients) - (looked_up if 'embedding' in gradients else 0)
    moved = least_moved(
      part * (count(shapes) - looked_up),
      dict(mesh.shape),
      activations=added / sharding.data_parallel_size(mesh),
      update=update,
      once=part * count(readout),
      trained=part * trained,
    )
    n = mesh.shape['fsdp']
    if not statistics or mesh.size != n * mesh.shape['data']:
      return moved
    # The unembedding moves less where devices share the vocabulary.
    of_each = tokens / passes / mesh.size
    vocab = config.vocab_size
    vectors = [exchanged(vocab, of_each, n, g, update=update) for g in sharing(vocab, n)]
    saved = passes * (vectors[0] - min(vectors))
    return moved - saved * config.width * jnp.dtype(config.dtype).itemsize

  def flops(self, policy: Policy, rows: int, *, update: bool) -> float:
    """Operations on a chip of one pass over full rows."""
    layout = self.phase.layout._replace(pack=0)
    full = full_batch(rows, self.phase.collect.length, layout.prompt_length)
    count = speed.update_flops if update else speed.forward_flops
    return count(policy.config, full, layout) / self.run.mesh.size

  def updates(self) -> list[Planned]:
    """Updates: of networks, of the policy, of anchors that learn, and further ones of the policy."""
    phase, policy = self.phase, self.run.policy
    made = phase.collect.further_rows
    further = {n: Batch(**_given(made[n], phase.collect.length)) for n in phase.further}
    place = functools.partial(by_rows, self.run.mesh)
    network = lambda n, one: self.network_update(n, one, phase.networks[n].minibatches)
    return [
      *(network(n, one) for n, one in phase.network_learners(policy).items()),
      self.update('update', phase.learner(policy), self.rows(phase.minibatches), phase.epochs),
      *(
        self.update(f'update of {n}', one, self.rows(phase.learned[n].minibatches))
        for n, one in phase.anchor_learners(policy).items()
      ),
      *(
        self.update(f'update of {n}', one, jax.tree.map(place, further[n]))
        for n, one in phase.further_learners(policy).items()
      ),
    ]

  def update(self, name: str, learner: Any, batch: Batch, epochs: int = 1) -> Planned:
    """One update by a learner; a batch is cut into as many as divide its rows."""
    run, phase, state = self.run, self.phase, self.state
    policy = getattr(learner, 'learner', learner).policy
    rows, length = batch.tokens.shape
    trained, opt_state = local(learned(policy, state.params)), state.opt_state
    if not isinstance(learner, Learner):
      opt_state = state.learned[learner.name]['opt_state']
    gathered = self.gathered(policy, run.mesh)
    collected = phase.collect.rows if batch.group_ids is not None else rows
    return Planned(
      f'{self.name} {name}',
      epochs * max(1, collected // rows),
      run.mesh,
      jax.jit(learner.update, donate_argnums=0, out_shardings=(_places(state), None)),
      (state, batch),
      Counts(
        flops=self.flops(policy, rows, update=True),
        # Parameters and optimizer are read and written, gradients too; weights are read by both passes.
        bytes=2 * (trained + local(opt_state)) + 2 * trained + 3 * gathered,
        least_moved=self.least(
          policy, run.mesh, rows * length, update=True, passes=phase.micro_batches, statistics=True
        ),
      ),
      # The sampler reads a copy meanwhile.
      resident=self.copied() if getattr(phase.collect, 'overlaps', False) else 0.0,
    )

  def network_update(self, name: str, one: Any, minibatches: int) -> Planned:
    """An update of a network, on states that the model computes."""
    batch = self.rows(minibatches).replace(layout=PLAIN)
    rows = len(batch.tokens)
    return Planned(
      f'{self.name} update of {name}',
      minibatches,
      self.run.mesh,
      jax.jit(one.update, donate_argnums=0, out_shardings=(_places(self.state), None)),
      (self.state, batch),
      self.forward_counts(one.policy, rows),
    )

  def forward_counts(self, policy: Policy, rows: int) -> Counts:
    mesh = self.run.mesh
    return Counts(
      flops=self.flops(policy, rows, update=False),
      bytes=self.gathered(policy, mesh),
      least_moved=self.least(
        policy,
        mesh,
        rows * self.phase.collect.length,
        passes=self.phase.micro_batches,
        statistics=True,
      ),
    )

  def anchors(self) -> list[Planned]:
    """The log-probs of all rows under anchors: one program for copies of the policy, one a model."""
    phase, run = self.phase, self.run
    rows = phase.collect.rows
    kinds = {'anchor': run.policy} if phase.anchors.keys() - phase.frozen.keys() else {}
    kinds |= {f'anchor {n}': model for n, model in phase.frozen.items() if n in phase.anchors}
    copies = len(phase.anchors.keys() - phase.frozen.keys())

    def one(name: str, policy: Policy) -> Planned:
      score = functools.partial(
        forward_in_pieces, policy, temperature=1.0, micro_batches=phase.micro_batches
      )
      params = placed_params(policy, run.mesh)
      return Planned(
        f'{self.name} {name}',
        copies if name == 'anchor' else 1,
        run.mesh,
        jax.jit(lambda params, batch: score(params, batch).logp),
        (params, self.rows(1)),
        self.forward_counts(policy, rows),
        resident=local(self.state) - local(params),
      )

    return [one(*kind) for kind in kinds.items()]

  def network_scores(self) -> list[Planned]:
    """The scores of all rows by networks."""
    run, state = self.run, self.state
    batch = self.rows(1).replace(layout=PLAIN)

    def one(name: str, learner: Any) -> Planned:
      params = placed_params(learner.policy, run.mesh)
      own = state.networks[name]['params']
      return Planned(
        f'{self.name} scores of {name}',
        1,
        run.mesh,
        jax.jit(learner.scores),
        (params, own, batch),
        self.forward_counts(learner.policy, len(batch.tokens)),
        resident=local(state) - local((params, own)),
      )

    return [one(*item) for item in self.phase.network_learners(run.policy).items()]

  @property
  def sampled_on(self) -> Any:
    return self.run.sampled_on

  @property
  def apart(self) -> bool:
    """Whether other chips sample than those that train."""
    return self.run.sampled_on is not self.run.mesh

  def sets(self, names: Any) -> dict[str, Any]:
    """The parameter sets that the sampler reads, on its devices."""
    model = lambda n: self.phase.frozen.get(n, self.run.policy)
    if self.copies:
      return {n: memory.sent(self.run.engine, model(n), self.sampled_on) for n in names}
    return {n: placed_params(model(n), self.sampled_on) for n in names}

  @property
  def copies(self) -> bool:
    """Whether the sampler reads copies of the parameters."""
    return self.apart or getattr(self.phase.collect, 'overlaps', False)

  def copied(self) -> float:
    """Bytes on a chip of the copies of parameters that the sampler reads, if it has its own."""
    return local(self.sets(self.sampler().policies))

  def sampler(self, kind: type[Sampler] = Sampler) -> Any:
    """The sampler of the phase, whose methods are the steps of its program."""
    return make_sampler(self.phase, self.run.policy, self.sampled_on, self.run.engine, kind)

  def transfers(self) -> list[Planned]:
    """The copy of the parameters to the sampler, if it needs its own."""
    if not self.copies:
      return []
    size, wide = self.copied(), jnp.dtype(self.run.policy.config.dtype).itemsize
    least = sum(
      min(wide / x.dtype.itemsize, 1) * local(x)
      for x in jax.tree.leaves(self.sets(self.sampler().policies))
    )
    counts = Counts(flops=0.0, bytes=size, least_moved=least if self.apart else 0.0)
    return [Planned(f'{self.name} transfer', 1, self.sampled_on, None, (size,), counts)]

  def drawn_from(self) -> float:
    """Bytes of the weights that decoding reads, without their cut over fsdp."""
    weights = memory.unstacked(self.run.engine.drawn_from(self.run.policy), self.sampled_on)
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))
    return total / self.sampled_on.shape['tensor']

  def rollouts(self) -> list[Planned]:
    """The prefill of a sampler, one step of its decoding, and the whole rollout."""
    mesh, policy, collect = self.sampled_on, self.run.policy, self.phase.collect
    config, chips = policy.config, mesh.size
    one = self.sampler()
    count, length = collect.records, collect.length
    width = length - collect.max_new_tokens
    shape = lambda dtype, *sizes: by_rows(mesh, jax.ShapeDtypeStruct(sizes, dtype))
    prompts = shape(jnp.int32, count, width), shape(jnp.bool_, count, width)
    sets = self.sets(one.policies)
    held = 0.0 if self.apart else local(self.state) - local(sets)
    models, size = len(sets), self.drawn_from()
    gathered = models * size
    forward = lambda rows, length, layout=PLAIN: speed.forward_flops(
      config, full_batch(rows, length, length), layout, logits=False
    )
    fewer = size / self.gathered(policy, mesh)
    least = lambda n, passes=1: models * self.least(policy, mesh, n, passes=passes * fewer)

    read = lambda sets, tokens, mask: one.prefill(one.unstacked(sets, 0), tokens, mask)
    prefill = Counts(models * forward(count, width) / chips, gathered, least(count * width))

    # A step of decoding, as in the loop: its state is donated, and parameters are unstacked before it.
    def begin(sets, tokens, mask):
      read_prompts = read(sets, tokens, mask)
      return one.refill(read_prompts, one.start(read_prompts, width))

    with jax.set_mesh(mesh):
      state = jax.tree.map(functools.partial(by_rows, mesh), jax.eval_shape(begin, sets, *prompts))
      state = state._replace(caches=placed_caches(mesh, state.caches))
      flat = jax.eval_shape(lambda sets: one.unstacked(sets, 0), sets)
    flat |= {n: memory.unstacked(model, mesh) for n, model in one.policies.items()}
    keys = lambda ids: one.row_keys(jnp.int32(0), jnp.int32(0), ids)
    draw = lambda sets, ids, state: one.draw(sets, keys(ids), None, width, state)
    rows = count * collect.samples_per_prompt
    slots = one.slots or rows
    # A new token is multiplied with all weights, sees at most `length` tokens and gets logits.
    logits = 2.0 * config.vocab_size * config.width
    flops = forward(slots, length) - forward(slots, length - 1) + logits * slots
    cache = local(state.caches)
    decode = Counts(models * flops / chips, gathered + cache, least(slots))
    draws = -(-rows // slots) * collect.max_new_tokens
    layout = Layout(width, collect.samples_per_prompt, 0)
    flops = forward(rows, length, layout) + logits * rows * collect.max_new_tokens
    whole = Counts(
      models * flops / chips,
      # On average half of the new columns have been written.
      gathered * (1 + draws) + cache * draws * (width + collect.max_new_tokens / 2) / length,
      least(count * width) + draws * least(slots),
    )
    ids, number = shape(jnp.int32, count), jax.ShapeDtypeStruct((), jnp.int32)
    run = functools.partial(one.run, padding=0)
    make = lambda name, times, function, arguments, counts, parts={}: Planned(
      f'{self.name} {name}', times, mesh, function, arguments, counts, held, parts
    )
    steps = {f'{self.name} prefill': 1, f'{self.name} decode': draws}
    return [
      make('prefill', 0, jax.jit(read), (sets, *prompts), prefill),
      make('decode', 0, jax.jit(draw, donate_argnums=2), (flat, ids, state), decode),
      make('rollout', 1, jax.jit(run), (sets, *prompts, ids, number, number), whole, steps),
    ]

  def continued(self) -> list[Planned]:
    """The programs of a sampler of rows in flight, see `sampling.resumable`.

    It reads all rows anew, prompts and what has been drawn of them, and then draws one token in each
    until a batch is complete: on average `prompts / in_flight` of the tokens of a row in a step.
    """
    mesh, policy, collect = self.sampled_on, self.run.policy, self.phase.collect
    chips, length, new = mesh.size, collect.length, collect.max_new_tokens
    one = self.sampler(resumable.ResumableSampler)
    sizes = collect.in_flight, collect.samples_per_prompt, length - new, new
    rows = jax.tree.map(functools.partial(by_rows, mesh), resumable.empty(*sizes))
    count = len(rows.made)
    sets = self.sets(one.policies)
    held = 0.0 if self.apart else local(self.state) - local(sets)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    with jax.set_mesh(mesh):
      flat, _, seen = jax.eval_shape(one.read_rows, sets, rows, number)
    flat |= {n: memory.unstacked(model, mesh) for n, model in one.policies.items()}
    seen = jax.tree.map(functools.partial(by_rows, mesh), seen)
    seen = seen._replace(caches=placed_caches(mesh, seen.caches))

    def draw(sets: Any, rows: Any, seen: Any, seed: Any, version: Any) -> Any:
      return one.draw_one(sets, one.keys_of(seed, rows), None, version, rows, seen)

    def advance(sets: Any, rows: Any, seen: Any, due: Any, numbers: Any) -> Any:
      return one.advance(sets, rows, seen, None, *numbers[:2], due, *numbers[2:])

    models, draws = len(sets), -(-new * collect.prompts // collect.in_flight)
    forward = lambda length: speed.forward_flops(
      policy.config, full_batch(count, length, length), PLAIN, logits=False
    )
    logits = 2.0 * policy.config.vocab_size * policy.config.width * count
    size, cache = self.drawn_from(), local(seen.caches)
    gathered, fewer = models * size, size / self.gathered(policy, mesh)
    least = lambda tokens: models * self.least(policy, mesh, tokens, passes=fewer)
    flops = lambda count: models * count / chips
    reread = Counts(flops(forward(length)), gathered + cache, least(count * length))
    step = forward(length) - forward(length - 1) + logits
    decode = Counts(flops(step), gathered + cache, least(count))
    sums = zip(reread, decode, strict=True)
    whole = Counts(*(once + draws * each for once, each in sums))
    due = jax.ShapeDtypeStruct((collect.in_flight,), bool)
    steps = {f'{self.name} prefill': 1, f'{self.name} decode': draws}
    make = lambda name, times, function, arguments, counts, parts={}: Planned(
      f'{self.name} {name}', times, mesh, function, arguments, counts, held, parts
    )
    drawn = flat, rows, seen
    return [
      make('prefill', 0, jax.jit(one.read_rows), (sets, rows, number), reread),
      make('decode', 0, jax.jit(draw, donate_argnums=2), (*drawn, number, number), decode),
      make(
        *('rollout', 1, jax.jit(advance, donate_argnums=2)),
        *((*drawn, due, (number,) * 4), whole, steps),
      ),
    ]


def make_sampler(
  phase: Any,
  policy: Policy,
  mesh: Any,
  engine: Any = engines.OWN,
  kind: type[Sampler] = Sampler,
) -> Any:
  """The sampler of a phase, whose methods are the steps of its program."""
  collect = phase.collect
  return sampling.configure(
    kind,
    {name: engine.drawn_from(one) for name, one in phase.frozen.items()},
    mesh,
    default=engine.drawn_from(policy),
    behavior_policy=getattr(collect, 'behavior_policy', sampling.behavior_policies.current),
    max_new_tokens=collect.max_new_tokens,
    samples_per_prompt=collect.samples_per_prompt,
    slots=collect.slots,
    stop_ids=(0,),
    pad_id=0,
    temperature=collect.temperature,
    top_k=collect.top_k,
    top_p=collect.top_p,
    token_temperature=sampling.processors.unchanged,
    speculate=collect.proposer,
  )


def by_rows(mesh: Any, x: Any) -> jax.ShapeDtypeStruct:
  """The shape of an array with its rows over data and fsdp, or whole if they do not divide."""
  rows = x.ndim and x.shape[0] % sharding.data_parallel_size(mesh) == 0
  whole = NamedSharding(mesh, PartitionSpec())
  return _placed(x, sharding.batch_sharding(mesh, x.ndim) if rows else whole)


def placed_caches(mesh: Any, caches: Mapping[str, caching.Cache]) -> dict[str, caching.Cache]:
  """The shapes of caches by name, with the shardings of their buffers."""

  def place(axes: tuple[str, ...], x: Any) -> jax.ShapeDtypeStruct:
    return _placed(x, NamedSharding(mesh, sharding.partition_spec(mesh, axes, x.shape)))

  def span(one: caching.Span) -> caching.Span:
    each = lambda axes, buffers: tuple(caching.each(place, axes, x) for x in buffers)
    keys, values = each(caching.KEYS, one.keys), each(caching.VALUES, one.values)
    return caching.Span(keys, values, place(caching.POSITIONS, one.positions))

  return {name: caching.Cache(tuple(map(span, one.spans))) for name, one in caches.items()}


def full_batch(rows: int, length: int, prompt: int) -> Batch:
  """Rows without padding, whose completions begin at column `prompt`."""
  shape = rows, length
  mask = np.broadcast_to(np.arange(length) >= prompt, shape)
  return Batch(
    tokens=np.broadcast_to(np.int32(0), shape),
    segment_ids=np.broadcast_to(np.int32(1), shape),
    mask=mask,
  )


def compiled(
  planned: list[Planned], tell: Callable[[Program], None] = lambda program: None
) -> list[Program]:
  """Compiles programs for the shapes of their arguments, and looks at the results.

  Args:
    tell: is called with each program when it has been compiled.
  """
  found = {}
  for one in planned:
    made = compile_one(one)
    if one.parts and not math.isnan(made.compiled_flops) and one.parts.keys() <= found.keys():
      made = _as_parts(made, [(found[name], times) for name, times in one.parts.items()])
    found[one.name] = made
    tell(made)
  return list(found.values())


def compile_one(planned: Planned) -> Program:
  """Compiles one program, and looks at the result."""
  started = time.perf_counter()
  program = functools.partial(
    Program,
    planned.name,
    **planned.counts._asdict(),
    times=planned.times,
    chips=planned.mesh.size,
  )
  failed = functools.partial(program, compiled_flops=math.nan, collectives=[])
  if planned.function is None:
    [size] = planned.arguments
    copies = [hlo.Collective('copy', 'sampler_mesh', 1, size)] if planned.counts.least_moved else []
    held = size + planned.resident
    return program(held, 0.0, compiled_flops=0.0, collectives=copies, seconds=0.0)
  try:
    with jax.set_mesh(planned.mesh):
      made = planned.function.lower(*planned.arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    used = re.search(r'Used ([\d.]+)([GM]) of', str(error))
    held = float(used[1]) * {'G': 2**30, 'M': 2**20}[used[2]] if used else math.nan
    seconds, text = time.perf_counter() - started, str(error).splitlines()[0][:300]
    return failed(held + planned.resident, math.nan, seconds=seconds, error=text)
  seconds = time.perf_counter() - started
  memory = made.memory_analysis()
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  held += planned.resident - memory.alias_size_in_bytes
  sizes = held, memory.temp_size_in_bytes
  try:
    text = made.as_text()
  except jax.errors.JaxRuntimeError:  # jaxlib cannot read the instructions of a newer libtpu
    return failed(*sizes, seconds=seconds)
  flops, moved = hlo.product_flops(text), hlo.collectives(text, dict(planned.mesh.shape))
  return program(*sizes, compiled_flops=flops, collectives=moved, seconds=seconds)


def _as_parts(program: Program, parts: list[tuple[Program, float]]) -> Program:
  """The program with the products and collectives of its parts."""
  sums = collections.defaultdict(lambda: (0, 0.0))
  for one, times in parts:
    for kind, axes, count, moved in one.collectives:
      before = sums[kind, axes]
      sums[kind, axes] = before[0] + round(times * count), before[1] + times * moved
  order = sorted(sums.items(), key=lambda item: -item[1][1])
  return program._replace(
    compiled_flops=sum(times * one.compiled_flops for one, times in parts),
    collectives=[hlo.Collective(*key, *found) for key, found in order],
  )


def _links(name: str) -> dict[str, tuple[bool, ...]]:
  """Which dimensions of a slice are rings; without an entry, libtpu takes all for lines.

  The compiler gathers otherwise on a line than on a ring. Slices of v4 and v5p are rings in all
  dimensions if each is a multiple of 4; of v5e and v6e a dimension of 16 is a ring.

  >>> _links('v5p:4x4x8')
  {'wrap': (True, True, True)}
  >>> _links('v6e:8x16')
  {'wrap': (False, True, False)}
  >>> _links('v5e:4x4'), _links('v5p:2x2x4')
  ({}, {})
  """
  sizes = [int(n) for n in name.partition(':')[2].split('x') if n.isdigit()]
  if len(sizes) == 3:
    rings = [all(n % 4 == 0 for n in sizes)] * 3
  else:
    rings = [n == 16 for n in sizes] + [False] * (3 - len(sizes))
  return {'wrap': tuple(rings)} if any(rings) else {}


def topology(name: str) -> list[Any]:
  """The devices of a TPU topology that is not there.

  Raises:
    ImportError: libtpu is not installed.
    ValueError: there is no such topology.
  """
  # No metadata server is asked, and no chip is taken, so other processes may use libtpu too.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  try:
    import libtpu  # noqa: F401
  except ImportError as error:
    raise ImportError("the compiler for TPUs is missing; pip install 'jax[tpu]'") from error
  from jax.experimental import topologies

  try:
    found = topologies.get_topology_desc(platform='tpu', topology_name=name, **_links(name))
    return list(found.devices)
  except Exception as error:  # whatever libtpu raises for a name that it does not know
    if 'lockfile' in str(error):
      raise ValueError('another process uses libtpu; try again when it has ended') from error
    known = 'v4:2x2x4, v5e:4x4, v5p:4x4x4 or v6e:16x16'
    raise ValueError(
      f'--topology={name}: libtpu knows no such topology ({str(error).splitlines()[0]}); write '
      f'GENERATION:SHAPE, such as {known}'
    ) from error


def _given(rows: int, length: int) -> Mapping[str, Any]:
  """The arrays of a batch of given completions, as shapes."""
  shape = lambda kind: jax.ShapeDtypeStruct((rows, length), kind)
  return dict(tokens=shape(jnp.int32), segment_ids=shape(jnp.int32), mask=shape(jnp.bool_))


def _places(state: Any) -> Any:
  return jax.tree.map(lambda x: x.sharding, state)


def _placed(x: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
