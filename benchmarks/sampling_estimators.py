"""Where a method changes what is sampled: exact bias and noise of its gradient, over several prompts.

python -m benchmarks.sampling_estimators   # all rows; --new: those that the report does not have

Writes docs/sampling_estimators.json and its part of docs/estimators.md, which says how to read it.
The functions of the repository that choose prompts, groups and rows (`collect.replay.replaced`,
`curricula`, `collect.picks`, `collect.beginnings`, ...) are called for every result of their random
numbers (`polgrad.tabular.outcomes`), so what is measured is the code.
"""

import argparse
import functools
import itertools
import json
import types
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from benchmarks import estimators, estimators_page
from polgrad import credit as credits
from polgrad import curricula, methods, objectives, optim, sharding
from polgrad.collect import (
  beginnings,
  branched,
  exploration,
  inpainted,
  old_runs,
  picks,
  replay,
  starts,
  trees,
)
from polgrad.collect.drawn import Drawn
from polgrad.collect.scored import Texts, informative, replacements
from polgrad.curricula import Curriculum, Request, trackers
from polgrad.data import chunks
from polgrad.losses import (
  advantages,
  aggregation,
  embedding_rewards,
  logit_stats,
  selections,
  surrogates,
)
from polgrad.losses import trees as tree_losses
from polgrad.models.policy import Policy
from polgrad.registry import bind
from polgrad.rewards.scoring import Scores
from polgrad.sampling import processors
from polgrad.tabular import enumerable
from polgrad.tabular.estimators import Setting, gradients
from polgrad.tabular.outcomes import Choices, best_chances, first_chances, outcomes
from polgrad.types import STREAMS, Batch, TrainState

GROUP = 4
# Of each prompt: the probability of the first right token, and of the second one behind it.
TOKENS = ((0.2, 0.25), (0.6, 0.5), (0.75, 0.8), (0.98, 0.97))
RATES = np.array([a * b for a, b in TOKENS])  # success rates p
PROMPTS, SEQUENCES, LENGTH = len(TOKENS), 4, 2
POLICY = enumerable.table(
  2, LENGTH, prompts=PROMPTS
)  # no stop token: all completions have two tokens
RIGHT = 3  # the right completion of each prompt, tokens 1 1
REWARDS = np.tile(np.arange(SEQUENCES) == RIGHT, PROMPTS).astype(float)
UNIFORM = np.full(PROMPTS, 1 / PROMPTS)


class Moments(NamedTuple):
  """Mean and variance (trace of the covariance) of the gradient of a step."""

  mean: np.ndarray
  variance: float


class Law(NamedTuple):
  """What a step may hold.

  `scale` and `square` are the means of w and of w^2 of a factor w of the gradient, given the batch.
  """

  chance: np.ndarray  # f[n]
  rows: np.ndarray  # i[n, B]
  features: Mapping[str, np.ndarray] = types.MappingProxyType({})
  scale: np.ndarray | float = 1.0
  square: np.ndarray | float = 1.0


class Parts(NamedTuple):
  """Credit and objective. Two are equal if their names are."""

  name: str
  credit: credits.Estimator
  objective: objectives.Objective

  def __hash__(self):
    return hash(self.name)

  def __eq__(self, other):
    return self.name == other.name


class Row(NamedTuple):
  """A row of the report."""

  parts: Callable[[], Parts]
  moments: Callable[[Parts], Moments]
  stated: Callable[[], np.ndarray] | None = None  # the gradient of what is stated; None: of E[R]
  reward: Callable[[], np.ndarray] | None = (
    None  # the gradient of E[R], if another R; None: climbed
  )


# The policy, and what it climbs.


def logits() -> np.ndarray:
  """f64[PROMPTS * 3, 2]: of the empty prefix, of 0 and of 1."""
  log_odds = lambda p: [0.0, np.log(p / (1 - p))]
  return np.array([log_odds(p) for a, b in TOKENS for p in (a, 0.4, b)])


@functools.cache
def setting() -> Setting:
  params = jnp.asarray(logits())
  return Setting(
    policy=POLICY,
    rewards=REWARDS,
    params=params,
    behavior=params,
    anchors={'reference': params},
    values=values(),
    arrays={'finished': np.ones(len(REWARDS), bool)},
  )


def values() -> np.ndarray:
  """A critic at rest: the exact value before every token, f64[S, 2]."""
  found = np.zeros(POLICY.tokens.shape)
  for row, tokens in enumerate(POLICY.tokens):
    a, b = TOKENS[row // SEQUENCES]
    found[row] = a * b, b if tokens[0] == 1 else 0.0
  return found


def probabilities() -> np.ndarray:
  """f64[PROMPTS, SEQUENCES]."""
  log_p = np.asarray(enumerable.logp(POLICY, setting().params)).sum(axis=1)
  return np.exp(log_p).reshape(PROMPTS, SEQUENCES)


@functools.cache
def _slopes() -> np.ndarray:
  """The gradients of P(the rest is right | x, h right tokens are given), [PROMPTS, 2, P * V]."""

  def rest(params):
    log_p = enumerable.logp(POLICY, params).reshape(PROMPTS, SEQUENCES, LENGTH)[:, RIGHT]
    return jnp.exp(jnp.stack([log_p.sum(axis=1), log_p[:, 1]], axis=1))

  return np.asarray(jax.jit(jax.jacrev(rest))(setting().params)).reshape(PROMPTS, LENGTH, -1)


def climbed(share: np.ndarray, hints: Sequence[float] = (1.0,)) -> np.ndarray:
  """The gradient of sum_x share_x sum_h hints_h E[R | x, the first h right tokens are given]."""
  return np.einsum('x,h,xhp->p', share, hints, _slopes()[:, : len(hints)])


def normalized_slope(rates: np.ndarray, size: int, extra: float = 0.0) -> np.ndarray:
  """F'(p) of the objective mean_x F(p_x) that rewards divided by the deviation of their group climb.

      F'(p) = sqrt((G - 1) / G) sum_k C(G, k) p^k (1 - p)^(G - k) h_k sqrt(k (G - k)) / (G p (1 - p))

  The deviation is the unbiased one. For large G it is 1 / sqrt(p (1 - p)), and F(p) = 2 arcsin sqrt(p).
  h_k = 1 + extra (1 - k / G) is a weight of the group.
  """
  weight = lambda k: (1 + extra * (1 - k / size)) * np.sqrt(k * (size - k)) / size
  spread = sum(c * weight(k) for k, c in enumerate(binomial(rates, size)))
  return np.sqrt((size - 1) / size) * spread / (rates * (1 - rates))


def binomial(rates: np.ndarray, size: int) -> np.ndarray:
  """P(k of `size` are right), f64[size + 1, ...]."""
  found = [np.ones_like(rates)]
  for _ in range(size):
    up, stay = [0 * rates, *(x * rates for x in found)], [*(x * (1 - rates) for x in found), 0]
    found = [a + b for a, b in zip(up, stay)]
  return np.stack(found)


# Groups, and the moments of laws.


@functools.cache
def groups(size: int = GROUP) -> Law:
  """Every group of every prompt, prompts uniformly drawn."""
  return continued(0, size)


def continued(given: int, size: int = GROUP) -> Law:
  """Every group of every prompt whose rows begin with the first right tokens, outside the mask."""
  begins = (POLICY.tokens[:SEQUENCES, :given] == 1).all(axis=1)
  some = np.flatnonzero(begins)
  local = np.array(list(itertools.product(some, repeat=size)))
  rows = np.concatenate([local + x * SEQUENCES for x in range(PROMPTS)])
  p = probabilities() * begins
  p = p / p.sum(axis=1, keepdims=True)
  mask = np.broadcast_to(np.arange(LENGTH) >= given, (*rows.shape, LENGTH))
  return Law(p.ravel()[rows].prod(axis=1) / PROMPTS, rows, {'mask': mask})


def right(law: Law) -> np.ndarray:
  """The number of right rows of each group, i[n]."""
  return REWARDS[law.rows].sum(axis=1).astype(int)


def prompt(law: Law) -> np.ndarray:
  return law.rows[:, 0] // SEQUENCES


@functools.cache
def _of_groups(parts: Parts, size: int) -> np.ndarray:
  return _gradients(groups(size).rows, {}, parts)


def _gradients(rows: np.ndarray, features: dict, parts: Parts) -> np.ndarray:
  features = {'replay_weight': np.ones(rows.shape)} | features
  return gradients(setting(), parts.credit, parts.objective, rows, features)


def found(law: Law, parts: Parts) -> np.ndarray:
  """The gradient of each batch of the law."""
  size = law.rows.shape[1]
  if law.rows is groups(size).rows:
    return _of_groups(parts, size)
  return _gradients(law.rows, law.features, parts)


def moments(law: Law, parts: Parts) -> Moments:
  each = found(law, parts)
  mean = (law.chance * law.scale) @ each
  square = (law.chance * law.square) @ np.square(each).sum(axis=1)
  return Moments(mean, float(square - mean @ mean))


def mixed(share: float, one: Moments, other: Moments) -> Moments:
  """Of a step whose groups are independent, `share` of them of the one kind: one group of each kind."""
  mean = share * one.mean + (1 - share) * other.mean
  return Moments(mean, share**2 * one.variance + (1 - share) ** 2 * other.variance)


def by_prompt(share: np.ndarray, weight: np.ndarray | float = 1.0) -> Callable[[Parts], Moments]:
  """A group of a prompt drawn with other probabilities; `weight` f[PROMPTS] multiplies its loss."""
  law = groups()
  weight = np.broadcast_to(weight, PROMPTS)[prompt(law)]
  chance = law.chance * share[prompt(law)] * PROMPTS
  return functools.partial(moments, law._replace(chance=chance, scale=weight, square=weight**2))


# Laws.


def scored(counts: list[int]) -> Batch:
  """Groups with these numbers of right rows, as a collector holds them."""
  rewards = np.concatenate([np.arange(GROUP) < k for k in counts]).astype(np.float32)
  numbers = np.repeat(np.arange(len(counts), dtype=np.int32), GROUP)
  blank = np.zeros((len(rewards), 1), np.int32)
  return Batch(
    tokens=blank,
    segment_ids=blank,
    mask=blank > 0,
    group_ids=numbers,
    prompt_ids=numbers,  # here the number of the group among the candidates
    rewards=rewards,
    valid=np.ones(len(rewards), bool),
  )


def useful(count: int) -> bool:
  """Whether dynamic sampling keeps a group."""
  batch = scored([count])
  texts = Texts([], [], Scores(batch.rewards, {}, batch.valid, {}, []))
  return bool(informative(batch, texts, GROUP)[0])


def filtered(parts: Parts, *, attempts: int) -> Moments:
  """Dynamic sampling: the group of a step is replaced at most `attempts` times while it is dull."""
  return moments(with_filter(groups(), attempts), parts)


def with_filter(law: Law, attempts: int) -> Law:
  kept = np.array([useful(k) for k in range(GROUP + 1)])[right(law)]
  dull = law.chance[~kept].sum()
  factors = {True: 0.0, False: 0.0}  # of the probability of a group, by whether it is useful
  for draws in itertools.product((True, False), repeat=attempts + 1):
    last = 0
    for number in range(1, attempts + 1):
      if replacements(np.array([draws[last]]), np.array([draws[number]]))[0]:
        last = number
    others = [1 - dull if one else dull for i, one in enumerate(draws) if i != last]
    factors[draws[last]] += float(np.prod(others))
  return law._replace(chance=law.chance * np.where(kept, factors[True], factors[False]))


def tempered(parts: Parts, *, attempts: int = 0) -> Moments:
  """HAPO: tokens at their own temperatures, by the entropies of the group before."""
  law = groups()
  return moments(law._replace(chance=tempered_chances(law.chance, attempts)), parts)


def tempered_chances(before: np.ndarray, attempts: int = 0) -> np.ndarray:
  """The probabilities of groups f64[n], from those of the group before them."""
  law, settings = groups(), methods.TABLE['hapo'](max_new_tokens=10).collect.keywords
  scaled = bind(settings['token_temperature'], processors.TABLE)
  logits = setting().params
  # Rounded, because those of .4 and .6 are equal: no rounding error should order them.
  entropy = logit_stats.entropy(logits).round(12)[POLICY.prefixes][law.rows]
  levels = jax.vmap(
    lambda x: selections.entropy_levels(x, jnp.ones(x.shape, bool), share=settings['low_entropy'])
  )
  levels, where = np.unique(np.asarray(levels(entropy)), axis=0, return_inverse=True)
  chance = np.zeros(len(law.rows))
  for level, weight in zip(levels, np.bincount(where.ravel(), weights=before)):
    log_p = np.asarray(enumerable.logp(POLICY, scaled(logits, entropy_levels=level))).sum(axis=1)
    own = law._replace(chance=np.exp(log_p)[law.rows].prod(axis=1) / PROMPTS)
    chance += weight * with_filter(own, attempts).chance
  return chance


@functools.cache
def replayed(older: int = 3, **choice) -> Law:
  """The group that takes a place, by `replay.replaced`: the new one, or one of `older` remembered ones.

  What is chosen depends on rewards alone, so only numbers of right rows are enumerated.
  """
  law = groups()
  chances = np.bincount(right(law), weights=law.chance, minlength=GROUP + 1)
  choice = replay.Choice(fraction=1.0, **choice)
  scale, square = np.zeros(GROUP + 1), np.zeros(GROUP + 1)
  ages = np.arange(older + 1.0)
  for counts in itertools.product(range(GROUP + 1), repeat=older + 1):
    chance = chances[list(counts)].prod()
    run = functools.partial(replay.replaced, scored(list(counts)), 1, ages, choice, GROUP)
    for part_, batch in outcomes(run):
      weight = batch['replay_weight'][0] if 'replay_weight' in batch else 1.0
      count = counts[batch.prompt_ids[0]]
      scale[count] += chance * part_ * weight
      square[count] += chance * part_ * weight**2
  own = lambda x: (x / chances)[right(law)]
  return law._replace(scale=own(scale), square=own(square))


def recalled(parts: Parts, **choice) -> Moments:
  """Half of the groups of a step are new, half are replaced."""
  return mixed(0.5, moments(groups(), parts), moments(replayed(**choice), parts))


def with_old_runs(parts: Parts) -> Moments:
  """Half of the groups of a step are new, half of an old run, whose logits were half as large."""
  law, before = groups(), setting()._replace(behavior=setting().params / 2)
  log_p = np.asarray(enumerable.logp(POLICY, before.behavior)).sum(axis=1)
  chance = np.exp(log_p)[law.rows].prod(axis=1) / PROMPTS
  features = {'replay_weight': np.ones(law.rows.shape)}
  each = gradients(before, parts.credit, parts.objective, law.rows, features)
  mean = chance @ each
  old = Moments(mean, float(chance @ np.square(each).sum(axis=1) - mean @ mean))
  return mixed(1 - old_share(), moments(law, parts), old)


def old_share() -> float:
  """The share of groups of an old run in a batch of two, by `old_runs.mixed`."""
  new, old = (scored([0] * n) for n in (2, 3))
  new, old = (x.replace(sampled_at=np.zeros(len(x.rewards), np.int32)) for x in (new, old))
  run = functools.partial(old_runs.mixed, new, old, fraction=0.5, rows_per_prompt=GROUP)
  shares = outcomes(lambda random: float((run(random=random).sampled_at < 0).mean()))
  return sum(chance * share for chance, share in shares)


def picked(parts: Parts, **settings) -> Moments:
  """Rows of the group drawn again, with the probabilities of `picks.filter_weights`."""
  law = groups()
  rewards = REWARDS[law.rows]
  share = picks.filter_weights(rewards, np.ones(rewards.shape, bool), **settings)
  drawn = np.zeros((len(law.rows), SEQUENCES))  # probability of each completion in a place
  np.add.at(drawn, (np.arange(len(law.rows))[:, None], law.rows % SEQUENCES), share)
  local = np.array(list(itertools.product(range(SEQUENCES), repeat=GROUP)))
  chance = np.zeros((PROMPTS, len(local)))
  for x in range(PROMPTS):
    own = prompt(law) == x
    chance[x] = law.chance[own] @ drawn[own][:, local].prod(axis=2)
  assert (groups().rows.reshape(PROMPTS, -1, GROUP)[0] == local).all()
  return moments(law._replace(chance=chance.ravel()), parts)


@functools.cache
def hint_chances(begin: Callable[..., int], step: int = 0) -> np.ndarray:
  """P(0 or 1 of the answer's tokens is given), f64[2]; the last token is never given."""
  share = np.zeros(LENGTH)
  for chance, number in outcomes(lambda random: begin(LENGTH - 1, random, step)):
    share[number] += chance
  return share


def hinted(parts: Parts, share: np.ndarray, features: Callable[[Law, int], Law]) -> Moments:
  """Groups that begin with a part of the answer, with these probabilities."""
  each = [moments(features(continued(h), h), parts) for h in range(LENGTH)]
  mean = sum(p * one.mean for p, one in zip(share, each))
  square = sum(p * (one.variance + one.mean @ one.mean) for p, one in zip(share, each))
  return Moments(mean, float(square - mean @ mean))


def masked(law: Law, given: int) -> Law:
  """Given tokens are no part of the loss."""
  del given
  return law


def restarted(law: Law, given: int) -> Law:
  """As `collect.Restarts`: rows that begin with given tokens are in the stream of demonstrations."""
  kind = STREAMS.index('demonstration' if given else 'sampled')
  stream = np.full(law.rows.shape, kind, np.int32)
  return law._replace(features=law.features | {'stream': stream})


def with_hint(law: Law, given: int) -> Law:
  """As `collect.Rollouts(hints=1)`: the mask of a further row of each group has the given tokens."""
  row = (prompt(law) * SEQUENCES + RIGHT)[:, None]
  mask = np.broadcast_to(np.arange(LENGTH) < given, (len(row), 1, LENGTH))
  kinds = [STREAMS.index('sampled')] * GROUP + [STREAMS.index('demonstration')]
  return law._replace(
    rows=np.concatenate([law.rows, row], axis=1),
    features={
      'mask': np.concatenate([law.features['mask'], mask], axis=1),
      'stream': np.tile(np.array(kinds, np.int32), (len(row), 1)),
    },
  )


@functools.cache
def inpainted_law(least: float = 0.2, most: float = 0.6, replaced: float = 0.5) -> Law:
  """IGPO: of groups without a right row some rows become right attempts that began with a hint."""
  law = groups()
  n = len(law.rows)
  right_rows = REWARDS[law.rows]
  lost = inpainted.hopeless(right_rows, np.ones(right_rows.shape, bool), 1.0)
  cut = lambda random: chunks.random(LENGTH, random, shortest=1, longest=1)
  hint = np.zeros(LENGTH)
  for chance, given in outcomes(
    lambda random: inpainted.hint_length(cut(random), random.uniform(least, most))
  ):
    hint[given] += chance
  # Probability that an attempt of each prompt is right and was given h tokens, f64[PROMPTS, 2].
  rest = np.array([[a * b, b] for a, b in TOKENS])
  attempt = hint * rest
  chance, rows, injected = [law.chance[~lost]], [law.rows[~lost]], []
  injected.append(np.zeros((n - lost.sum(), GROUP, LENGTH)))
  limit = int(np.rint(replaced * GROUP))
  for kinds in itertools.product((-1, *range(LENGTH)), repeat=GROUP):  # of attempts; -1 is wrong
    kinds = np.array(kinds)
    taken = inpainted.replacements(np.array([0]), kinds[None] >= 0, GROUP, limit, Choices([]))
    own, new = law.rows[lost].copy(), np.zeros((lost.sum(), GROUP, LENGTH))
    own[:, taken.rows] = (prompt(law)[lost] * SEQUENCES + RIGHT)[:, None]
    new[:, taken.rows] = np.arange(LENGTH) < kinds[taken.attempts][:, None]
    x = prompt(law)[lost]
    each = [attempt[x, k] if k >= 0 else 1 - attempt[x].sum(axis=1) for k in kinds]
    chance.append(law.chance[lost] * np.prod(each, axis=0))
    rows.append(own)
    injected.append(new)
  return _merged(np.concatenate(chance), np.concatenate(rows), np.concatenate(injected))


def _merged(chance: np.ndarray, rows: np.ndarray, injected: np.ndarray) -> Law:
  """Equal batches as one."""
  keys = np.concatenate([rows, injected.reshape(len(rows), -1).astype(int)], axis=1)
  keys, where = np.unique(keys, axis=0, return_inverse=True)
  size = rows.shape[1]
  return Law(
    np.bincount(where.ravel(), weights=chance),
    keys[:, :size],
    {'injected': keys[:, size:].reshape(-1, size, LENGTH).astype(float)},
  )


@functools.cache
def branched_law() -> Law:
  """Agentic ARPO: a reply between the two tokens, behind which rows are copied; copies share the first.

  A reply is a column outside of the mask, so an answer is two turns of one token.
  """
  settings = methods.TABLE['agentic_arpo']().collect(
    prompts=1, samples_per_prompt=GROUP, prompt_length=1, max_new_tokens=LENGTH + 1
  )
  context = types.SimpleNamespace(
    policy=types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=2)), seed=0
  )
  tokens = POLICY.tokens[:SEQUENCES]
  found: dict[tuple[int, ...], float] = {}
  for x, p in enumerate(probabilities()):
    log_p = np.asarray(enumerable.logp(POLICY, setting().params))[x * SEQUENCES :]

    def drawn(numbers, log_p=log_p) -> Drawn:
      spread = lambda pair: np.insert(pair[list(numbers)], 1, 0, axis=1)
      shape = len(numbers), LENGTH + 1
      batch = Batch(
        tokens=spread(tokens),
        segment_ids=np.ones(shape, np.int32),
        mask=np.tile([True, False, True], (len(numbers), 1)),
        behavior_logp=spread(log_p),
        prompt_ids=np.zeros(len(numbers), np.int32),
      )
      return Drawn(batch, [])

    def run(random, drawn=drawn, p=p):
      def continuer(state, batch, prefixes, *_, anew):
        """The rest of each row, from a column on."""
        chosen = []
        for row, column in zip(prefixes.rows, prefixes.columns):
          same = anew | (tokens[:, 0] == batch.tokens[row, 0])
          assert column == (0 if anew else 2)
          chosen.append(int(random.choice(SEQUENCES, p=p * same / (p * same).sum())))
        return drawn(chosen)

      steps = branched.BranchedSteps(
        **dict.fromkeys(('draw_rows', 'annotate', 'assign')),
        settings=settings,
        context=context,
        continuer=continuer,
        mask_truncated=False,
      )
      begun = [int(random.choice(SEQUENCES, p=p)) for _ in range(settings.first)]
      rows = branched.Growing(
        batch=drawn(begun).batch,
        episodes=[],
        prompt=np.zeros(settings.first, int),
        anew=np.zeros(settings.first, int),
        ids=[],
      )
      steps.complete(rows, random, None, [{}], 0)
      return tuple((rows.batch.tokens[:, 0] * 2 + rows.batch.tokens[:, 2]).tolist())

    for chance, numbers in outcomes(run):
      key = tuple(x * SEQUENCES + number for number in numbers)
      found[key] = found.get(key, 0.0) + chance / PROMPTS
  return Law(np.array([*found.values()]), np.array([*found]))


def as_model() -> Policy:
  """The table as a model whose rows are a prompt, by its number, and two tokens."""

  def hidden(params, tokens, segment_ids):
    first = jnp.where(jnp.arange(tokens.shape[1]) == 1, 1 + tokens[:, 1:2], 0)
    return jax.nn.one_hot(tokens[:, :1] * 3 + first, len(params['table']))

  return Policy(
    **dict.fromkeys(Policy._fields)
    | dict(
      config=types.SimpleNamespace(vocab_size=2, balance_rate=0.0),
      hidden=hidden,
      unembed=lambda params, hidden: hidden @ params['table'],
      readout=lambda params: params,
      labels=lambda tree: jax.tree.map(lambda _: 'train', tree),
    )
  )


def avoiding(learning_rate: float) -> Callable[[int, Sequence[int]], np.ndarray]:
  """(prompt, two completions) -> the probabilities of the completions that PROPS draws next.

  The collector is that of the method, with one prompt and 16 updates.
  """
  explored = methods.TABLE['props'](behavior_learning_rate=learning_rate).collect
  settings = explored(
    prompts=1,
    samples_per_prompt=GROUP,
    prompt_length=1,
    max_new_tokens=LENGTH,
    epochs=16,
    minibatches=1,
    optimizer=bind(explored.keywords['optimizer'], optim.TABLE),
  )
  mesh = sharding.make_mesh()
  context = types.SimpleNamespace(policy=as_model(), mesh=mesh, micro_batches=1)
  counters = ('step', 'phase', 'phase_step', 'update', 'cursor', 'skipped')
  state = TrainState(
    **dict.fromkeys(counters, jnp.int32(0)),
    **dict.fromkeys(('opt_state', 'collect_state', 'credit_state', 'objective_state'), ()),
    params={'table': setting().params},
    anchors={},
  )
  behavior = exploration.make_behavior(settings, context)

  def chances(x: int, own: Sequence[int]) -> np.ndarray:
    seen = np.column_stack([np.full(len(own), x), POLICY.tokens[[*own]]]).astype(np.int32)
    batch = Batch(
      tokens=seen,
      segment_ids=np.ones_like(seen),
      mask=np.broadcast_to(np.arange(LENGTH + 1) > 0, seen.shape),
    )
    with jax.set_mesh(mesh):
      batch = exploration.joined([batch], settings.rounds, 1)
      moved = behavior.avoiding(state, batch, seed=(0,)).params['table']
    log_p = np.asarray(enumerable.logp(POLICY, moved)).sum(axis=1)
    return np.exp(log_p).reshape(PROMPTS, SEQUENCES)[x]

  return chances


@functools.cache
def avoiding_law(learning_rate: float) -> Law:
  """PROPS: half of a group is drawn by a policy that was trained to avoid the other half."""
  later = functools.cache(avoiding(learning_rate))
  pairs = np.array(list(itertools.product(range(SEQUENCES), repeat=GROUP // 2)))
  chance, rows = [], []
  for x, p in enumerate(probabilities()):
    for own in pairs:  # their order makes no difference to what avoids them
      chance.append(p[own].prod() * later(x, tuple(sorted(own)))[pairs].prod(axis=1) / PROMPTS)
      rows.append(x * SEQUENCES + np.column_stack([np.tile(own, (len(pairs), 1)), pairs]))
  return Law(np.concatenate(chance), np.concatenate(rows))


class Contrast(NamedTuple):
  """Every batch of GRACE: answers to the texts, queries and negatives of two records."""

  law: Law  # the trained rows, three of each record, with their rewards
  partners: np.ndarray  # i[n, 4], the other answers


RECORDS = ((0, 1, 2), (3, 2, 1))  # text, query and negative of each record: prompts of the table


def embeddings() -> np.ndarray:
  """f64[S, 3], of a prompt and its completion, by states of tokens that are fixed random numbers."""
  states = np.random.default_rng(0).normal(size=(PROMPTS, 1 + 2 + SEQUENCES, 3))
  x, local = np.divmod(np.arange(PROMPTS * SEQUENCES), SEQUENCES)
  rows = np.stack([states[x, 0], states[x, 1 + local // 2], states[x, 3 + local]], axis=1)
  return np.asarray(embedding_rewards.mean_pooled(jnp.asarray(rows), jnp.ones(rows.shape[:2])))


@functools.cache
def contrasted(size: int = 3, records: tuple = RECORDS, **weights: float) -> Contrast:
  """The law of `grace` with one answer to each query and negative.

  Args:
    size: rows of a group.
    records: of a step.
    weights: changes of the settings of its reward.
  """
  texts, others = np.repeat([x for x, _, _ in records], size), [x for _, *y in records for x in y]
  columns = len(texts) + len(others)
  every = np.indices((SEQUENCES,) * columns).reshape(columns, -1).T
  every = every + SEQUENCES * np.array([*texts, *others])
  rows, partners = every[:, : len(texts)], every[:, len(texts) :]
  table = {'embedding_rewards.contrastive': embedding_rewards.contrastive}
  settings = bind(methods.TABLE['grace']().collect.keywords['contrast'], table)
  ids, found = np.repeat(np.arange(len(records)), size), jnp.asarray(embeddings())

  def reward(rows, partners):
    query, negative = (jnp.repeat(found[partners[i::2]], size, axis=0) for i in (0, 1))
    valid = jnp.ones(len(ids), bool)
    return settings(query, found[rows], negative[:, None], jnp.asarray(ids), valid, **weights)

  some = jax.jit(jax.vmap(reward))
  cuts = np.array_split(np.arange(len(rows)), max(len(rows) // 2**16, 1))
  features = {
    'rewards': np.concatenate([np.asarray(some(rows[own], partners[own])) for own in cuts]),
    'group_ids': np.broadcast_to(ids, rows.shape),
  }
  return Contrast(Law(probabilities().ravel()[every].prod(axis=1), rows, features), partners)


def of_contrast(contrast: Contrast, *, own: bool) -> np.ndarray:
  """The gradient of the mean reward: by a row alone that has the reward, or by all answers."""
  law, rewards = contrast.law, contrast.law.features['rewards']
  log_p = lambda params: enumerable.logp(POLICY, params).sum(axis=1)
  each = np.asarray(jax.jacrev(log_p)(setting().params)).reshape(len(REWARDS), -1)
  weight = np.zeros(len(REWARDS))  # E[sum of rewards behind each answer]
  if own:
    np.add.at(weight, law.rows, law.chance[:, None] * rewards)
  else:
    every = np.concatenate([law.rows, contrast.partners], axis=1)
    np.add.at(weight, every, (law.chance * rewards.sum(axis=1))[:, None])
  return weight @ each / rewards.shape[1]


class Uncounted(trees.TreeSteps):
  """Steps whose operations are not counted, because a table has no model."""

  def count(self, rows: Drawn, samples_per_prompt: int) -> Drawn:
    del samples_per_prompt
    return rows


@functools.cache
def grown_trees(settings: trees.Trees) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Every result of the trees of one prompt, by the collector's own steps.

  Returns:
    chance: f[n] of each result, over uniform prompts.
    rows: i[n, leaves], the leaves as numbers of rows.
    drawn_by: i[n, leaves, length], which leaf drew each token.
  """
  context = types.SimpleNamespace(seed=0)
  tokens = POLICY.tokens[:SEQUENCES]
  found: dict[tuple, float] = {}
  for x, p in enumerate(probabilities()):
    log_p = np.asarray(enumerable.logp(POLICY, setting().params))[x * SEQUENCES :]

    def run(random, x=x, p=p, log_p=log_p):
      def drawn(numbers) -> Drawn:
        rows = list(numbers)
        batch = Batch(
          tokens=tokens[rows],
          segment_ids=np.ones((len(rows), LENGTH), np.int32),
          mask=np.ones((len(rows), LENGTH), bool),
          behavior_logp=log_p[rows],
          prompt_ids=np.zeros(len(rows), np.int32),
        )
        return Drawn(batch, [])

      def begin(state, records, step):
        return drawn(int(random.choice(SEQUENCES, p=p)) for _ in range(settings.trees))

      def continuer(state, batch, prefixes, *_):
        """The rest of each row, from a column on."""
        chosen = []
        for row, column in zip(prefixes.rows, prefixes.columns):
          same = (tokens[:, :column] == batch.tokens[row, :column]).all(axis=1)
          chosen.append(int(random.choice(SEQUENCES, p=p * same / (p * same).sum())))
        return drawn(chosen)

      steps = Uncounted(
        **dict.fromkeys(('annotate', 'assign', 'values')),
        settings=settings,
        context=context,
        draw_rows=begin,
        continuer=continuer,
        mask_truncated=False,
      )
      batch = steps.sample(None, lambda count: [{'id': 0}], 0)[0].batch
      rows = x * SEQUENCES + 2 * batch.tokens[:, 0] + batch.tokens[:, 1]
      return (*rows.tolist(), *batch['drawn_by'].ravel().tolist())

    for chance, result in outcomes(run):
      found[result] = found.get(result, 0.0) + chance / PROMPTS
  results, size = np.array([*found]), settings.leaves
  return np.array([*found.values()]), results[:, :size], results[:, size:].reshape(-1, size, LENGTH)


def trained_leaves(rows: np.ndarray, trained: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The leaves that are trained on, for every order in which they may be taken.

  Args:
    rows: i[n, leaves], leaves as numbers of rows.
    trained: leaves of each result that are trained on.

  Returns:
    number: i[m], a result.
    kept: i[m, trained], leaves of it.
    chance: f[m] that they are kept.
  """
  size = rows.shape[1]
  orders = list(itertools.permutations(range(size)))
  cases, valid = [], np.ones(size, bool)
  for number, own in enumerate(rows):
    for order in orders:
      random = types.SimpleNamespace(permutation=lambda n, order=order: np.array(order))
      kept = trees.chosen(REWARDS[own], valid, size, trained, random)
      cases.append((number, *kept.tolist()))
  cases, times = np.unique(np.array(cases), axis=0, return_counts=True)
  return cases[:, 0], cases[:, 1:], times / len(orders)


def leaves_law(trained: int = 3, grown: int = 2) -> Law:
  """TreeRL: every tree is forked once, at its least likely token; some leaves are trained on."""
  settings = methods.TABLE['treerl'](trained=trained, grown=grown, forks=1, branches=1).collect(
    prompts=1, prompt_length=0, max_new_tokens=LENGTH
  )
  size = settings.leaves
  chance, rows, drawn_by = grown_trees(settings)
  number, kept, of_kept = trained_leaves(rows, trained)
  chosen = (kept[:, :, None] == np.arange(size)).any(axis=1)
  group_ids, mask = np.zeros(size, np.int32), np.ones((size, LENGTH), bool)
  valid = np.ones(size, bool)
  values = jax.jit(
    jax.vmap(lambda r, by, own: tree_losses.tree_values(r, group_ids, valid, by, mask, own))
  )(REWARDS[rows][number], drawn_by[number], chosen)
  some = lambda x: np.take_along_axis(np.asarray(x), kept[:, :, None], axis=1)
  return Law(
    chance[number] * of_kept,
    np.take_along_axis(rows[number], kept, axis=1),
    {name: some(x) for name, x in values._asdict().items()},
  )


# Curricula, whose counts are at rest: estimated success rates are exact.


def asked(random: object, count: int, samples: int = GROUP) -> Request:
  """A request that takes its random numbers from this object."""
  return type('Asked', (Request,), {'random': random})(
    count=count, size=PROMPTS, cursor=0, seed=0, samples_per_prompt=samples
  )


def at_rest() -> trackers.DiscountedBeta:
  return trackers.DiscountedBeta(1e3 * RATES, 1e3 * (1 - RATES))


def drawn_by(curriculum: Curriculum, state: object) -> np.ndarray:
  """The probabilities of the prompts of a step with one group."""
  random = lambda noise: types.SimpleNamespace(gumbel=lambda size: noise)
  return first_chances(lambda noise: curriculum.propose(state, asked(random(noise), 1))[0], PROMPTS)


def by_returns() -> np.ndarray:
  """The probabilities of `curricula.returns`, where the return of a prompt is its success rate."""
  return np.asarray(curricula.returns().init([{'return': float(p)} for p in RATES]), float)


def by_thompson() -> np.ndarray:
  """The share of each prompt in draws of `curricula.vade`, whose counts are at rest.

  Each count decays by .9 * .99 a step, and a step adds a group of the prompt. Of the scores only their
  order matters, and they rise and then fall, so `best_chances` has the probabilities.
  """
  strength = GROUP / (1 - 0.9 * 0.99)
  state = trackers.DiscountedBeta(1 + strength * RATES, 1 + strength * (1 - RATES))
  curriculum = curricula.vade(decay=0.9, decay_all=0.99)

  def beats(one: float, other: float) -> bool:
    drawn = types.SimpleNamespace(beta=lambda alpha, beta: np.array([other, one, 0.0, 0.0]))
    return int(curriculum.propose(state, asked(drawn, 1))[0]) == 1

  return best_chances(beats, [scipy.stats.beta(*counts) for counts in zip(*state)])


def of_categories(curriculum: Curriculum, state: trackers.Bandit) -> np.ndarray:
  """The probabilities of the prompts in a curriculum that draws categories of them."""
  orders = list(itertools.permutations(range(PROMPTS)))  # in which rows of a category come
  share = np.zeros(PROMPTS)
  for order in orders:

    def run(random, order=order):
      own = types.SimpleNamespace(choice=random.choice, random=lambda size: np.array(order, float))
      return int(curriculum.propose(state, asked(own, 1))[0])

    for chance, row in outcomes(run):
      share[row] += chance / len(orders)
  return share


def by_bandit() -> np.ndarray:
  """The probabilities of `curricula.sec` at rest, if each prompt is a category."""
  right_rows = np.arange(GROUP + 1)
  magnitude = 2 * np.sqrt(right_rows * (GROUP - right_rows)) / GROUP  # mean |A| of a group
  value = magnitude @ binomial(RATES, GROUP)
  state = trackers.Bandit(value, np.arange(PROMPTS, dtype=np.int32))
  return of_categories(curricula.sec(), state)


def by_weights(categories: str, **weights: float) -> np.ndarray:
  """The probabilities of `curricula.mixed`; `categories` has a letter for each prompt."""
  curriculum = curricula.mixed(weights=weights)
  return of_categories(curriculum, curriculum.init([{'category': letter} for letter in categories]))


def in_stages(*stages: int) -> np.ndarray:
  """The probabilities of `curricula.stages`, as the mean of some of two stages of one step each."""
  curriculum = curricula.stages(number=2, steps=1)
  state = curriculum.init([{'difficulty': float(1 - p)} for p in RATES])
  return np.mean([drawn_by(curriculum, state | {'step': step}) for step in stages], axis=0)


def once_more(curriculum: Curriculum, state: object) -> dict[tuple[int, int], float]:
  """P(prompts of a step with two groups) of `curricula.revisit`, whose noise orders new prompts."""
  orders = list(itertools.permutations(range(PROMPTS)))
  rows = lambda noise, order: curriculum.propose(
    state,
    asked(types.SimpleNamespace(gumbel=lambda size: noise, random=lambda size: order), 2),
  )
  again = np.zeros(PROMPTS)
  if np.any(state['priority'] > 0):
    again = first_chances(lambda noise: rows(noise, np.zeros(PROMPTS))[0], PROMPTS)
  else:
    again[0] = 1.0  # the noise is not read
  found: dict[tuple[int, int], float] = {}
  for row, order in itertools.product(np.flatnonzero(again > 1e-12), orders):
    noise = np.where(np.arange(PROMPTS) == row, 0.0, -np.inf)
    pair = tuple(sorted(map(int, rows(noise, np.array(order) / PROMPTS))))
    found[pair] = found.get(pair, 0.0) + again[row] / len(orders)
  return found


@functools.cache
def revisited() -> list[tuple[float, dict[int, int]]]:
  """Two groups of `curricula.revisit`, after one group of each prompt: one again, one new."""
  curriculum = curricula.revisit()
  begun = curriculum.init([{}] * PROMPTS)
  update = jax.jit(curriculum.update)
  chances = binomial(RATES, GROUP)
  states: dict[tuple, float] = {}
  for counts in itertools.product(range(GROUP + 1), repeat=PROMPTS):
    batch = scored(list(counts))
    sampled = curricula.Sampled(
      batch.prompt_ids, batch.rewards, batch.valid, {}, np.zeros(len(batch.valid), bool)
    )
    state = update(begun, curricula.observed(batch, sampled))
    assert (np.asarray(state['visits']) == 1).all()
    key = tuple(np.asarray(state['priority']).tolist())
    chance = chances[list(counts), range(PROMPTS)].prod()
    states[key] = states.get(key, 0.0) + float(chance)
  pairs: dict[tuple[int, int], float] = {}
  for priority, chance in states.items():
    state = {'priority': np.array(priority), 'visits': np.ones(PROMPTS, np.int32)}
    for pair, own in once_more(curriculum, state).items():
      pairs[pair] = pairs.get(pair, 0.0) + chance * own
  return [(chance, dict.fromkeys(pair, GROUP)) for pair, chance in pairs.items()]


def share_of(allocations: list[tuple[float, dict[int, int]]]) -> np.ndarray:
  """The share of each prompt in the completions of steps."""
  share = np.zeros(PROMPTS)
  for chance, sizes in allocations:
    for x, n in sizes.items():
      share[x] += chance * n / sum(sizes.values())
  return share


def started_by_variance(new: float = 0.5) -> np.ndarray:
  """As ExIt starts groups: from a new row, or from one of a buffer by the variance of its rewards."""
  memory = starts.empty(PROMPTS, 1, 1)._replace(
    rows=np.arange(PROMPTS, dtype=np.int32), priorities=RATES * (1 - RATES)
  )
  share = np.zeros(PROMPTS)
  for chance, places in outcomes(lambda random: starts.chosen(memory, 1, random, new=new)):
    share += chance * (UNIFORM if places[0] < 0 else np.eye(PROMPTS)[memory.rows[places[0]]])
  return share


def pooled(parts: Parts, allocations: list[tuple[float, dict[int, int]]]) -> Moments:
  """A step whose prompts have different numbers of completions, each pooled to one group.

  Args:
    allocations: (probability, {prompt: completions}); all have the same sum.
  """
  mean, square = 0.0, 0.0
  for chance, sizes in allocations:
    total = sum(sizes.values())
    each = [(n / total, moments(_alone(x, n), parts)) for x, n in sizes.items()]
    own = sum(share * one.mean for share, one in each)
    mean = mean + chance * own
    square += chance * (own @ own + sum(share**2 * one.variance for share, one in each))
  return Moments(mean, float(square - mean @ mean))


@functools.cache
def _alone(x: int, size: int) -> Law:
  law = groups(size)
  return law._replace(chance=np.where(prompt(law) == x, law.chance * PROMPTS, 0.0))


def budgeted() -> list[tuple[float, dict[int, int]]]:
  """`curricula.budget`: eight completions for two random prompts, in groups of two."""
  curriculum, found = curricula.budget(prompts=0.5, most=3), []
  orders = list(itertools.permutations(range(PROMPTS)))
  for order in orders:
    random = types.SimpleNamespace(gumbel=lambda size, order=order: np.array(order, float))
    rows = curriculum.propose(at_rest(), asked(random, 4, 2)).tolist()
    found.append((1 / len(orders), {x: 2 * rows.count(x) for x in sorted({*rows})}))
  return found


def allocated(total: int = 8, least: int = 2, most: int = 6) -> list[tuple[float, dict[int, int]]]:
  """The budget of V_0 for two random prompts whose success rates are predicted exactly."""
  pairs = list(itertools.combinations(range(PROMPTS), 2))
  gains = curricula.expected_contrast(RATES, most)
  sizes = lambda pair: curricula.allocate_budget(gains[[*pair]], total, low=least, high=most)
  return [(1 / len(pairs), dict(zip(pair, map(int, sizes(pair))))) for pair in pairs]


def without_replacement(share: np.ndarray, count: int) -> list[tuple[float, tuple[int, ...]]]:
  """(probability, prompts) of `count` different prompts, in the order of the draws."""
  found = []
  for order in itertools.permutations(range(PROMPTS), count):
    left = 1 - np.concatenate([[0.0], np.cumsum(share[[*order]])[:-1]])
    found.append((float(np.prod(share[[*order]] / left)), order))
  return found


def single_stream(parts: Parts, count: int = 3) -> Moments:
  """SPO: one completion of each of three prompts, which are drawn without replacement."""
  chance, rows = [], []
  for own, order in without_replacement(drawn_by(curricula.spo(), at_rest()), count):
    for picked_ in itertools.product(range(SEQUENCES), repeat=count):
      chance.append(own * np.prod(probabilities()[[*order], [*picked_]]))
      rows.append(np.array(order) * SEQUENCES + picked_)
  rows = np.array(rows)
  features = {
    'tracked_value': RATES[rows // SEQUENCES],
    'group_ids': np.broadcast_to(np.arange(count, dtype=np.int32), rows.shape),
  }
  return moments(Law(np.array(chance), rows, features), parts)


def included(count: int = 3) -> np.ndarray:
  """The share of each prompt among those of a step of `single_stream`."""
  share = np.zeros(PROMPTS)
  for chance, order in without_replacement(drawn_by(curricula.spo(), at_rest()), count):
    share[[*order]] += chance / count
  return share


# Rows of the report.


def base() -> Parts:
  """REINFORCE with a leave-one-out baseline, which is unbiased where prompts and rows are."""
  objective = objectives.PolicyGradient(
    surrogate=surrogates.reinforce, aggregation=aggregation.sequence_sum
  )
  return Parts('base', credits.outcome(advantage=advantages.leave_one_out), objective)


def corrected_rows() -> Parts:
  """The same, with the ratio of the policy to the one that sampled as the factor of each token."""
  objective = objectives.PolicyGradient(
    surrogate=surrogates.importance_weighted, aggregation=aggregation.sequence_sum
  )
  return base()._replace(name='corrected', objective=objective)


def raw() -> Parts:
  """REINFORCE without a baseline, for rows whose rewards are not independent."""
  return Parts('raw', credits.outcome(advantage=advantages.raw), base().objective)


def method(name: str, **settings) -> Callable[[], Parts]:
  """Credit and objective of a method."""

  def parts():
    one = methods.TABLE[name](**settings)
    credit = bind(one.credit, credits.TABLE)
    return Parts(f'{name} {settings}', credit, bind(one.objective, objectives.TABLE))

  return parts


def plain(parts: Parts) -> Moments:
  return moments(groups(), parts)


def normalized() -> np.ndarray:
  return climbed(UNIFORM * normalized_slope(RATES, GROUP))


PER = dict(priority=replay.deviation, exponent=0.6)
RESETS = functools.partial(beginnings.uniform, probability=0.5)
ALWAYS = functools.partial(beginnings.uniform, probability=1.0)
ANNEALED = functools.partial(beginnings.annealed_chunks, steps=100)
HALFWAY = 49  # batches before, of 100
UFT = method('uft', steps=100, imitation=0.0, entropy_coefficient=0.0)
DAPO = method('dapo', max_new_tokens=10)


def from_hints(begin: Callable[..., int], step: int = 0) -> Callable[[], np.ndarray]:
  return lambda: climbed(UNIFORM, hint_chances(begin, step))


def by_curriculum(curriculum: Callable[[], Curriculum]) -> dict:
  return by_share(lambda: drawn_by(curriculum(), at_rest()))


def by_share(share: Callable[[], np.ndarray]) -> dict:
  """The moments of prompts with these probabilities, and the objective with them."""
  return {
    'moments': lambda parts: by_prompt(share())(parts),
    'stated': lambda: climbed(share()),
  }


def corrected(parts: Parts) -> Moments:
  """SPO's prompts, each with the weight 1 / (n q)."""
  share = drawn_by(curricula.spo(), at_rest())
  return by_prompt(share, replay.importance_weights(share, 1.0, scaled=False))(parts)


def with_settings(function: Callable, **settings) -> Callable[[Parts], Moments]:
  return lambda parts: function(parts, **settings)


def starting(begin, features, step: int = 0) -> Callable[[Parts], Moments]:
  return lambda parts: hinted(parts, hint_chances(begin, step), features)


LAWS: dict[str, Row] = {
  'uniform prompts, independent rows': Row(base, plain),
  'dynamic sampling, at most twice': Row(base, with_settings(filtered, attempts=2)),
  'tokens at their own temperatures': Row(base, tempered),
  'replay, all groups alike': Row(base, with_settings(recalled)),
  'replay by deviation^.6': Row(base, with_settings(recalled, **PER)),
  'the same, weights with b = .4': Row(base, with_settings(recalled, **PER, correction=0.4)),
  'the same, b = 1': Row(base, with_settings(recalled, **PER, correction=1.0)),
  'the same, b = 1, not scaled': Row(
    base, with_settings(recalled, **PER, correction=1.0, scaled=False)
  ),
  'dull groups become the newest useful ones': Row(
    base,
    lambda parts: moments(
      replayed(priority=replay.recovery, exponent=float('inf'), into='dull'), parts
    ),
  ),
  'rows are copied behind a reply': Row(base, lambda parts: moments(branched_law(), parts)),
  'half of the rows avoid the others, rate .01': Row(
    base, lambda parts: moments(avoiding_law(0.01), parts)
  ),
  'the same, rate .1': Row(base, lambda parts: moments(avoiding_law(0.1), parts)),
  'half of the groups of an old run': Row(base, with_old_runs),
  'the same, ratios of tokens': Row(corrected_rows, with_old_runs),
  'rows by `best_worst`': Row(raw, with_settings(picked, strategy='best_worst')),
  'rows by `best`': Row(raw, with_settings(picked, strategy='best')),
  'half of the groups start in the answer': Row(base, starting(RESETS, masked), from_hints(RESETS)),
  'all groups start in the answer': Row(base, starting(ALWAYS, masked), from_hints(ALWAYS)),
  'prompts by `spo`': Row(base, **by_curriculum(curricula.spo)),
  'prompts by `spo`, weighted by 1 / (n q)': Row(base, corrected),
  'prompts by `target`': Row(base, **by_curriculum(curricula.target)),
  'prompts by `window`': Row(base, **by_curriculum(curricula.window)),
  'prompts by `sec`': Row(base, **by_share(by_bandit)),
  'prompts by `returns`': Row(base, **by_share(by_returns)),
  'prompts by `vade`': Row(base, **by_share(functools.cache(by_thompson))),
  'prompts by `mixed`, weights 4 : 3 : 2 : 1': Row(
    base, **by_share(lambda: by_weights('abcd', a=4, b=3, c=2, d=1))
  ),
  'prompts by `mixed`, half of each of two sources': Row(
    base, **by_share(lambda: by_weights('abbb', a=1, b=1))
  ),
  'prompts by `stages`, the first of two': Row(base, **by_share(lambda: in_stages(0))),
  'the same, both stages': Row(base, **by_share(lambda: in_stages(0, 1))),
  'prompts by `revisit`': Row(
    base, lambda parts: pooled(parts, revisited()), lambda: climbed(share_of(revisited()))
  ),
  'completions by `budget`': Row(base, lambda parts: pooled(parts, budgeted())),
}
METHODS: dict[str, Row] = {
  '`dapo` without its filter': Row(DAPO, plain, normalized),
  '`dapo`': Row(DAPO, with_settings(filtered, attempts=2), normalized),
  '`hapo`': Row(
    method('hapo', max_new_tokens=10),
    with_settings(tempered, attempts=2),
    lambda: np.sqrt(GROUP / (GROUP - 1)) * normalized(),  # the deviation is the biased one
  ),
  '`confucius3`': Row(
    method('confucius3'),
    lambda parts: moments(
      replayed(priority=replay.recovery, exponent=float('inf'), into='dull'), parts
    ),
    lambda: climbed(UNIFORM * normalized_slope(RATES, GROUP, extra=1.0)),
  ),
  '`prioritized_replay`': Row(
    method('prioritized_replay', steps=1),
    with_settings(recalled, **PER, correction=0.4),
    normalized,
  ),
  '`exit_iteration`': Row(
    method('exit_iteration'),
    lambda parts: by_prompt(started_by_variance())(parts),
    lambda: climbed(started_by_variance() * normalized_slope(RATES, GROUP)),
  ),
  '`v0`, exact predictions': Row(method('v0'), lambda parts: pooled(parts, allocated())),
  '`spo_single_stream`, three prompts': Row(
    method('spo_single_stream'), single_stream, lambda: climbed(included())
  ),
  '`igpo`': Row(method('igpo'), lambda parts: moments(inpainted_law(), parts)),
  '`agentic_arpo`': Row(
    method('agentic_arpo'), lambda parts: moments(branched_law(), parts), normalized
  ),
  '`props`, rate .1': Row(
    method('props'), lambda parts: moments(avoiding_law(0.1), parts), normalized
  ),
  '`grace`, groups of three': Row(
    method('grace'),
    lambda parts: moments(contrasted().law, parts),
    lambda: of_contrast(contrasted(), own=True),
    lambda: of_contrast(contrasted(), own=False),
  ),
  '`treerl`, two trees of two leaves': Row(
    method('treerl'), lambda parts: moments(leaves_law(), parts)
  ),
  '`uft`, halfway': Row(UFT, starting(ANNEALED, with_hint, HALFWAY), from_hints(ANNEALED, HALFWAY)),
  '`hnpg`': Row(method('hnpg'), starting(RESETS, restarted), from_hints(RESETS)),
  '`pf_ppo`, all rows once': Row(method('pf_ppo', entropy_coefficient=0.0), plain),
  '`pf_ppo`': Row(
    method('pf_ppo', entropy_coefficient=0.0), with_settings(picked, strategy='best_worst')
  ),
}
ROWS = LAWS | METHODS


class Point(NamedTuple):
  """A row of the report."""

  angle: float  # degrees between the expected gradient and that of E[R]
  strength: float  # length of the expected gradient over that of E[R]
  noise: float  # standard deviation over the length of the expected gradient
  variance: float  # trace of the covariance, over the squared length of the gradient of E[R]
  stated_angle: float  # degrees to the gradient of the stated objective
  stated_strength: float
  # Factor of the gradient of each prompt's success rate; their mean is 1. []: R is no success.
  prompts: list[float]


def measure(name: str) -> Point:
  row = ROWS[name]
  parts = row.parts()
  point = compared(
    row.moments(parts),
    row.stated() if row.stated else climbed(UNIFORM),
    row.reward() if row.reward else climbed(UNIFORM),
  )
  return point._replace(prompts=[]) if row.reward else point


def compared(found_: Moments, stated: np.ndarray, reward: np.ndarray) -> Point:
  """The point of moments, with the gradients of the stated objective and of E[R]."""
  plain_, own = (
    estimators.compare(estimators.Distribution(found_.mean, max(found_.variance, 0.0)), true)
    for true in (reward, stated)
  )
  blocks = found_.mean.reshape(PROMPTS, -1), reward.reshape(PROMPTS, -1)
  factors = (blocks[0] * blocks[1]).sum(axis=1) / np.square(blocks[1]).sum(axis=1)
  return Point(
    angle=plain_.angle,
    strength=plain_.strength,
    noise=plain_.noise,
    variance=found_.variance / float(reward @ reward),
    stated_angle=own.angle,
    stated_strength=own.strength,
    prompts=(factors / factors.mean()).tolist(),
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--new', action='store_true', help='those that the report does not have')
  path = estimators_page.SAMPLING
  before = json.loads(path.read_text()) if parser.parse_args().new and path.exists() else {}
  rows = {}
  with jax.enable_x64(True):
    for name in ROWS:
      rows[name] = before.get(name) or measure(name)._asdict()
      shown = {k: v for k, v in rows[name].items() if k != 'prompts'}
      print(
        f'{name:45s}',
        *(f'{x:7.3f}' for x in shown.values()),
        np.round(rows[name]['prompts'], 2),
        flush=True,
      )
  path.write_text(json.dumps(rows, indent=1) + '\n')
  estimators_page.write(estimators.stored(), group=estimators.GROUP, left_out=estimators.LEFT_OUT)


if __name__ == '__main__':
  main()
