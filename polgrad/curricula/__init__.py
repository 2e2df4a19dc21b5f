"""Curricula: which data rows each step trains on.

| name | rows of a step |
|---|---|
| `epochs` | the next rows of shuffled epochs; the default |
| `uniform` | random rows |
| `mixed` | random rows of categories with fixed weights |
| `vade` | rows that are probably neither solved nor hopeless, by Thompson sampling |
| `spo` | random rows, more often those whose success rate is near 1/2 |
| `window` | random rows whose success rate lies between two numbers |
| `target` | random rows, more often those whose success rate is near a number |
| `stages` | random rows of the present stage, from easy to hard ones |
| `sec` | random rows of categories in which advantages are large |
| `budget` | random rows, each as often as is best for its success rate |
| `v0` | the same, for success rates that a model predicts from those of other prompts |
| `revisit` | new rows, and rows again whose rewards differed |
| `returns` | random rows, more often those with a large return; for data with completions |

A `Curriculum` is a few pure functions of a state that is kept in `TrainState` and its checkpoints, so a
resumed run draws the same rows. Success rates are estimated from the rewards of the run itself, each cut
to [0, 1]; docs/curricula.md has a command for each of them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax

from polgrad.compiling import jit
from polgrad.curricula import embeddings, in_context, trackers
from polgrad.curricula.base import (
  Counts,
  Curriculum,
  Observed,
  Request,
  Sampled,
  best,
  counts,
  drawn,
  observed,
)
from polgrad.curricula.budget import allocate_budget, expected_contrast, routed, routing_label
from polgrad.registry import AtLeastOne, Count, Fraction, NotNegative, Positive, table

__all__ = [
  'TABLE',
  'Counts',
  'Curriculum',
  'Observed',
  'Part',
  'Request',
  'Sampled',
  'allocate_budget',
  'best',
  'counts',
  'drawn',
  'embeddings',
  'expected_contrast',
  'in_context',
  'observed',
  'routed',
  'routing_label',
  'trackers',
]


def epochs() -> Curriculum:
  """The next rows of shuffled epochs: every row comes once in each epoch. Nothing is remembered."""
  return Curriculum(init=lambda records: (), propose=lambda state, request: request.next_rows())


def uniform() -> Curriculum:
  """Random rows, different ones in a step. Nothing is remembered."""
  return Curriculum(
    init=lambda records: (),
    propose=lambda state, request: drawn(np.ones(request.size), request),
  )


def _tracking(
  *, decay: float, decay_all: float = 1.0, prior: float = 0.0, term: str, **functions
) -> Curriculum:
  """A curriculum whose state is `trackers.DiscountedBeta`, of which it reports the mean success rate.

  Args:
    decay, decay_all, prior: of `trackers.updated`.
    term: of `counts`.
    functions: further fields of the curriculum; by default all counts start at 1/2.
  """

  def update(state, found):
    seen = counts(found, len(state.alpha), term)
    return trackers.updated(state, seen, decay=decay, decay_all=decay_all, prior=prior)

  own = dict(
    init=lambda records: trackers.begin(len(records), 0.5),
    update=update,
    report=lambda state: {'success_rate': float(np.mean(trackers.value(state)))},
    terms=frozenset({term} if term else ()),
    reads=frozenset({'rewards'}),
  )
  return Curriculum(**own | functions)


def vade(
  *,
  power: Positive = 2.0,
  decay: Fraction = 0.9,
  decay_all: Fraction = 0.99,
  term: str = '',
) -> Curriculum:
  """Rows that are probably neither solved nor hopeless, by Thompson sampling (VADE, arXiv:2511.18902).

  For every row theta ~ Beta(alpha, beta) is drawn, and the rows with the largest theta (1 - theta)^power
  are taken; with power 2 the score is largest at theta = 1/3. Counts start at alpha = beta = 1. After a
  step, alpha <- 1 + d (alpha - 1) + k and beta <- 1 + d (beta - 1) + G - k, for k right ones of G
  completions. How counts decay, and how fast, is our choice.

  Args:
    power: of the failure rate; 1 is the variance of the reward.
    decay: d of the rows of a step, times `decay_all`; 1 forgets nothing.
    decay_all: d of all rows, every step.
    term: name of the term of the reward that says how right a completion is; '' is the whole reward.
  """

  def propose(state, request):
    theta = request.random.beta(np.asarray(state.alpha), np.asarray(state.beta))
    return best(theta * (1 - theta) ** power, request)

  return _tracking(
    decay=decay,
    decay_all=decay_all,
    prior=1.0,
    term=term,
    init=lambda records: trackers.begin(len(records)),
    propose=propose,
  )


def spo(
  *,
  decay: Fraction = 0.875,
  slow_decay: Fraction = 0.0,
  half_drift: Positive = 0.06,
  floor: NotNegative = 0.05,
  rate_field: str = '',
  rollouts: Count = 8,
  term: str = '',
) -> Curriculum:
  """Random rows, more often those whose success rate v is near 1/2 (SPO, arXiv:2509.13232).

  The weight of a row is sqrt(v (1 - v)) + floor, drawn without replacement, with v = alpha /
  (alpha + beta). After a step, alpha <- decay alpha + k and beta <- decay beta + G - k, for k right ones
  of G completions. v from before the step is the feature `tracked_value`, a baseline that the row's own
  reward is not part of (`baselines.tracked_baseline`).

  With a `slow_decay` of 0.96, as in the paper, the weight of earlier counts of a prompt is not fixed but
  clip(2^(-D / half_drift), decay, slow_decay). D is the mean |log pi now - log pi then| over the tokens
  of the last response to the prompt, both after the updates of their step. This costs two forward passes
  a step, and host memory for a response to every data row (`TrainState.responses`).

  Args:
    decay: weight of earlier counts, the least one if it varies; N = 1 / (1 - decay) completions count.
    slow_decay: the largest weight of earlier counts; 0: all have the weight `decay`.
    half_drift: D at which the weight would be 1/2 without bounds, nats.
    floor: weight of a row that is always or never solved.
    rate_field: field of the records with a success rate that was measured before; '' starts all rows
      with alpha = beta = 1/2.
    rollouts: n completions that this rate was measured with: alpha = N (n rate + 1/2) / (n + 1).
    term: name of the term of the reward that says how right a completion is; '' is the whole reward.

  Raises:
    ValueError: `rate_field` with a decay of 1, for which N is infinite; or a `slow_decay` below `decay`.
  """
  if slow_decay and slow_decay < decay:
    raise ValueError(
      f'spo: slow_decay={slow_decay} is below decay={decay}; it must be 0 for a fixed decay, or the '
      'larger one of the two'
    )
  if rate_field and decay == 1:
    raise ValueError(
      'spo: with decay=1 nothing is forgotten, so rate_field has no weight to begin with'
    )

  def init(records):
    if not rate_field:
      return trackers.begin(len(records), 0.5)
    rates = np.clip(trackers.numbers(records, rate_field), 0, 1)
    return trackers.begin_from_rates(rates, rollouts, 1 / (1 - decay))

  def propose(state, request):
    v = trackers.value(state)
    return drawn(np.sqrt(v * (1 - v)) + floor, request)

  one = _tracking(
    decay=decay,
    term=term,
    init=init,
    propose=propose,
    features=lambda state, rows: {'tracked_value': trackers.value(state)[rows]},
    provides=frozenset({'tracked_value'}),
  )

  def update(state, found):
    size = len(state.alpha)
    weight = trackers.forgetting(
      trackers.drift_of_rows(found, size), half=half_drift, low=decay, high=slow_decay
    )
    return trackers.updated(state, counts(found, size, term), decay=weight)

  return one._replace(update=update, reads=one.reads | {'drift'}) if slow_decay else one


def window(
  *, low: Fraction = 0.2, high: Fraction = 0.8, decay: Fraction = 0.9, term: str = ''
) -> Curriculum:
  """Random rows whose estimated success rate v is between two numbers; other rows only if too few are.

  Counts start at 1/2 each, so rows that were never tried have v = 1/2.

  Args:
    low, high: least and largest v; 0 and 1 draw all rows alike.
    decay: weight of the earlier counts of a row that is tried again.
    term: as in `vade`.

  Raises:
    ValueError: `low` is above `high`.
  """
  if low > high:
    raise ValueError(f'window: low={low} is above high={high}')
  inside = lambda v: (v >= low) & (v <= high)
  return _of_rates(lambda v: inside(v).astype(np.float64), decay, term)


def target(
  *, rate: Fraction = 0.5, width: Positive = 0.15, decay: Fraction = 0.9, term: str = ''
) -> Curriculum:
  """Random rows with weights exp(-(v - rate)^2 / (2 width^2)), v the estimated success rate.

  Args:
    rate: the success rate with the largest weight.
    width: distance from it at which the weight is exp(-1/2).
    decay: weight of the earlier counts of a row that is tried again.
    term: as in `vade`.
  """
  return _of_rates(lambda v: np.exp(-((v - rate) ** 2) / (2 * width**2)), decay, term)


def _of_rates(weight, decay: float, term: str) -> Curriculum:
  """A curriculum that draws rows by a weight of their estimated success rate f[D]."""
  return _tracking(
    decay=decay,
    term=term,
    propose=lambda state, request: drawn(weight(trackers.value(state)), request),
  )


def budget(
  *,
  prompts: Fraction = 0.5,
  most: AtLeastOne = 4,
  decay: Fraction = 0.9,
  term: str = '',
) -> Curriculum:
  """Random rows, which get more completions where these are expected to differ (V_0, arXiv:2602.03584).

  A step has room for N groups of G completions. Of round(prompts N) random rows, row i gets n_i groups,
  which are pooled to one group of n_i G completions. The n_i, between 1 and `most`, have the sum N and
  maximise the sum of `expected_contrast` exactly, with the estimated success rates of the rows.

  The paper predicts success rates with a model of prompts; here they are estimated from the row's own
  completions in this run, as in `window`.

  Args:
    prompts: different rows, as a fraction of the groups of a step; 1 gives one group to each.
    most: groups of a row.
    decay: weight of the earlier counts of a row that is tried again.
    term: as in `vade`.

  Raises:
    ValueError: `prompts` is 0, or `most` groups of each row are fewer than a step has.
  """
  if not prompts * most >= 1:
    raise ValueError(f'budget: prompts={prompts} times most={most} must be at least 1')

  def propose(state, request):
    return _budgeted(
      lambda rows: trackers.value(state)[rows], request, prompts=prompts, low=1, high=most
    )

  return _tracking(
    decay=decay,
    term=term,
    propose=propose,
    pools=True,
  )


def _budgeted(
  rates: Callable[[np.ndarray], np.ndarray],
  request: Request,
  *,
  prompts: float,
  low: int,
  high: int,
) -> np.ndarray:
  """Random rows, each as often as it gets groups, so that the expected contrast is the largest.

  Args:
    rates: rows i[P] -> their success rates f[P].
    prompts: different rows, as a fraction of the groups that are asked for.
    low, high: least and largest number of groups of a row; a bound that the sum cannot keep is relaxed.
  """
  most = max(min(request.count // low, request.size), 1)
  number = min(max(round(prompts * request.count), -(-request.count // high), 1), most)
  rows = drawn(np.ones(request.size), request._replace(count=number))
  low, high = min(low, request.count // number), max(high, -(-request.count // number))
  gains = expected_contrast(rates(rows), high * request.samples_per_prompt)
  groups = gains[:, :: request.samples_per_prompt]  # column b: of b groups
  return np.repeat(rows, allocate_budget(groups, request.count, low=low, high=high))


def v0(
  *,
  embed: embeddings.Part = embeddings.character_ngrams,
  context: AtLeastOne = 256,
  memory: AtLeastOne = 1024,
  features: AtLeastOne = 8,
  rank: Fraction = 0.25,
  learning_rate: Positive = 1e-2,
  updates: Count = 8,
  prompts: Fraction = 0.125,
  least: AtLeastOne = 2,
  most: AtLeastOne = 32,
  term: str = '',
) -> Curriculum:
  """Random rows, with more completions where a model predicts a contrast (V_0, arXiv:2602.03584).

  A model reads the embedding of a prompt and, as its context, the results of the newest `context`
  completions of the run, each with the embedding of its prompt. It predicts the success rate p of the
  present policy on the prompt, also of one that was never tried (`in_context.score`). Of N groups of G
  completions, round(prompts N) random rows get numbers of completions B_x between `least` and `most`,
  with the sum N G, that maximise

      sum_x U(B_x, p_x),   U(B, p) = B (1 - p) (1 - (1 - p)^(B - 1))

  exactly; they are multiples of G. After a step, the model learns from the last `memory` results to
  predict those of some prompts from those of others, by `auxiliary_rewards.context_loss`. Its metrics
  are those of new results before it has learned from them: `ranking` is the fraction of pairs of a
  right and a wrong completion that it orders, 1/2 for a guess.

  Differences: In the paper the classifier is a tabular model that was pretrained and is frozen, behind
  an adapter of 168 queries that was trained on the results of many policies. Here the classifier is a
  mean of rewards over similar prompts, by four kernels that are learned from this run alone, so its
  first predictions are those of an untrained model. The paper chooses greedily and has `most` = 128;
  U is not concave, so a greedy choice may be wrong, and the exact one gives as many as it may to a
  few prompts of small p, because the increments of U tend to 1 - p. Embeddings are counts of
  characters by default; `embeddings.states` takes those of a frozen model, as in the paper.

  Args:
    embed: records -> embeddings of their prompts.
    context: completions that a prediction looks at.
    memory: completions that are learned from.
    features: numbers by which a kernel compares prompts.
    rank: weight of the ranking in the loss; the rest is that of the cross-entropy.
    learning_rate: of the model, by Adam.
    updates: of the model after a step.
    prompts: different rows, as a fraction of the groups of a step.
    least, most: completions of a row.
    term: as in `vade`.

  Raises:
    ValueError: `least` is above `most`.

  Confidence: PAPER (loss, utility, budget), from a detailed account of it; the model is ours.
  """
  if least > most:
    raise ValueError(f'v0: least={least} is above most={most}')
  optimizer = optax.adam(learning_rate)

  def init(records):
    width = embed([records[0]]).shape[1]
    return in_context.begin(optimizer, width, features=features, memory=memory)

  def propose(state, request):
    per_group = request.samples_per_prompt

    def rates(rows):
      found = embed([request.records[int(row)] for row in rows])
      return np.asarray(predict(state, found), np.float64)

    bounds = dict(low=-(-least // per_group), high=max(most // per_group, 1))
    return _budgeted(rates, request, prompts=prompts, **bounds)

  predict = jit(functools.partial(in_context.predicted, context=context))

  def update(state, found):
    rewards = jnp.asarray(found.terms[term] if term else found.rewards, jnp.float32)
    step = {
      'embeddings': found.embeddings,
      'rewards': rewards,
      'rows': found.rows,
      'valid': jnp.asarray(found.valid) & jnp.isfinite(rewards),
    }
    settings = dict(context=context, updates=updates, rank=rank)
    return in_context.learned(state, step, optimizer, **settings)

  return Curriculum(
    init=init,
    propose=propose,
    update=update,
    report=lambda state: {'loss': float(state.loss), 'ranking': float(state.ranking)},
    terms=frozenset({term} if term else ()),
    reads=frozenset({'rewards'}),
    pools=True,
    embed=embed,
  )


def stages(
  *,
  field: str = 'difficulty',
  number: AtLeastOne = 4,
  steps: AtLeastOne = 100,
  cumulative: bool = False,
) -> Curriculum:
  """Random rows of the present stage: the rows are cut into stages by a number in their records.

  Stage k of n has the rows between the quantiles k / n and (k + 1) / n of the field, borders included.
  The last stage lasts until the end of the phase.

  Args:
    field: of the records, a number; small ones come first.
    number: of stages.
    steps: of a stage.
    cumulative: also draw the rows of earlier stages.
  """

  def propose(state, request):
    score = np.asarray(state['score'])
    stage = min(int(state['step']) // steps, number - 1)
    low, high = np.quantile(score, [0.0 if cumulative else stage / number, (stage + 1) / number])
    return drawn((score >= low) & (score <= high), request)

  return Curriculum(
    init=lambda records: {
      'score': trackers.numbers(records, field),
      'step': np.zeros((), np.int32),
    },
    propose=propose,
    update=lambda state, found: state | {'step': state['step'] + 1},
    report=lambda state: {'stage': float(min(int(state['step']) // steps, number - 1))},
  )


def sec(
  *, field: str = 'category', rate: Fraction = 0.5, temperature: Positive = 1.0
) -> Curriculum:
  """Random rows of categories in which advantages are large: a bandit (SEC, arXiv:2505.14970).

  Each row of a step is of a category drawn from softmax(Q / temperature), and any row of it with equal
  probability. After a step, Q <- (1 - rate) Q + rate x for the categories that were in it, with x the
  mean |advantage| of their completions; Q starts at 0. With 0/1 rewards and group-normalised advantages
  x is 2 sqrt(p (1 - p)), largest for categories of which half is solved.

  Args:
    field: of the records, whose values are the categories: numbers, or the parts of a
      `sources.mixture`.
    rate: weight of the newest step.
    temperature: of the softmax; a small one draws the best category alone.
  """

  def propose(state, request):
    return _of_categories(trackers.softmax(state.value, temperature), state.category, request)

  def report(state):
    return {'value': state.value, 'probability': trackers.softmax(state.value, temperature)}

  return Curriculum(
    init=lambda records: trackers.begin_bandit(records, field),
    propose=propose,
    update=lambda state, found: trackers.rewarded(state, found, rate),
    report=report,
    names=lambda records: trackers.category_names(records, field),
    reads=frozenset({'magnitudes'}),
  )


def mixed(*, weights: Mapping[str, float], field: str = 'category') -> Curriculum:
  """Random rows of categories with fixed weights.

  Args:
    weights: by category, which need not add up to 1; categories without a weight are not drawn.
    field: of the records, whose values are the categories.

  Raises:
    ValueError: weights that are not numbers at least 0 by category, or a category that is not there.
  """
  numbers = [*weights.values()] if hasattr(weights, 'values') else [None]
  if not all(isinstance(x, int | float) and 0 <= x < float('inf') for x in numbers):
    raise ValueError(
      f'mixed: weights must be numbers by category, at least 0 and finite, got {weights!r}'
    )
  weights = dict(weights)

  def init(records):
    names = trackers.category_names(records, field)
    if not weights.keys() <= {*names} or not sum(weights.values()) > 0:
      raise ValueError(f'mixed: weights {weights}, but the categories are {list(names)}')
    shares = np.array([weights.get(name, 0.0) for name in names], np.float32)
    return trackers.begin_bandit(records, field)._replace(value=shares)

  def propose(state, request):
    shares = np.asarray(state.value, np.float64)
    return _of_categories(shares / shares.sum(), state.category, request)

  return Curriculum(init=init, propose=propose)


def _of_categories(probabilities: np.ndarray, category: np.ndarray, request: Request) -> np.ndarray:
  """Rows of categories that are drawn one by one; the rows of one category come in random order."""
  random, category = request.random, np.asarray(category)
  arms = random.choice(len(probabilities), request.count, p=probabilities / probabilities.sum())
  keys = random.random(request.size)
  rows = np.zeros(request.count, np.int64)
  for arm in np.unique(arms):
    own, places = np.flatnonzero(category == arm), np.flatnonzero(arms == arm)
    taken = np.flatnonzero(np.isin(own, request.taken))
    asked = request._replace(count=len(places), size=len(own), taken=tuple(taken.tolist()))
    rows[places] = own[best(keys[own], asked)]
  return rows


def revisit(
  *,
  new: Fraction = 0.5,
  exponent: NotNegative = 1.0,
  capacity: Count = 0,
  term: str = '',
) -> Curriculum:
  """New rows, and rows again whose rewards differed when they were tried last.

  A fraction `new` of the rows of a step are those that were tried least often, at random. The others are
  drawn with probabilities proportional to priority^exponent, without replacement. The priority of a row
  is p (1 - p), with p the success rate in the last step that had it: the variance of rewards that are 0
  or 1. Rows of priority 0 are not drawn again in this way; if there are too few others, more new rows
  are taken.

  This is the priority buffer of ExIt (arXiv:2509.04575) for prompts alone; `collect.Iterated` has the
  attempts that the paper appends to them. The paper's constants are not known to us.

  Args:
    new: 1 draws only new rows, as in random epochs.
    exponent: 0 draws all rows with a priority alike.
    capacity: number of rows that keep a priority, those with the largest ones; 0: all.
    term: as in `vade`.
  """

  def propose(state, request):
    priority, visits = np.asarray(state['priority'], np.float64), np.asarray(state['visits'])
    usable = priority > 0
    usable[[*request.taken]] = False
    again = min(request.count - round(new * request.count), int(usable.sum()))
    weights = np.where(usable, np.maximum(priority, 1e-12) ** exponent, 0.0)
    rows = drawn(weights, request._replace(count=again)) if again else np.zeros(0, np.int64)
    fresh = request._replace(
      count=request.count - again, taken=(*request.taken, *rows.tolist()), seed=request.seed + 1
    )
    noise = fresh.random.random(request.size)
    return np.concatenate([rows, best(noise - visits, fresh)])

  def update(state, found):
    size = len(state['visits'])
    seen = counts(found, size, term)
    tried = seen.total > 0
    p = seen.hits / jnp.maximum(seen.total, 1)
    priority = jnp.where(tried, p * (1 - p), state['priority'])
    if 0 < capacity < size:
      least = jax.lax.top_k(priority, capacity)[0][-1]
      priority = jnp.where(priority >= least, priority, 0.0)
    return {'priority': priority, 'visits': state['visits'] + tried.astype(jnp.int32)}

  return Curriculum(
    init=lambda records: {
      'priority': np.zeros(len(records), np.float32),
      'visits': np.zeros(len(records), np.int32),
    },
    propose=propose,
    update=update,
    report=lambda state: {'with_priority': float(np.mean(np.asarray(state['priority']) > 0))},
    terms=frozenset({term} if term else ()),
    reads=frozenset({'rewards'}),
  )


def returns(
  *,
  field: str = 'return',
  baseline_field: str = '',
  length_field: str = '',
  temperature: Positive = 0.1,
  top: Fraction = 0.0,
) -> Curriculum:
  """Random rows, more often those with a large return, for data with completions (arXiv:2306.13085).

  A row is drawn with the probabilities of `return_weights`, with replacement. Nothing is updated: the
  weights depend on the data alone.

  Args:
    field: of the records, the return G.
    baseline_field: of the records, a baseline that is subtracted from G, such as its value predicted
      from the prompt (advantage weighting); '' is none.
    length_field: of the records, a number of steps that multiplies the weight of a row. '' is none, and
      right where the loss is a mean over tokens, in which a long row counts more already.
    temperature: of the weights; a large one draws all rows alike.
    top: draw only this fraction of the rows, those with the largest returns, all alike; 0: by weights.
  """

  def init(records):
    found = trackers.numbers(records, field)
    if baseline_field:
      found = found - trackers.numbers(records, baseline_field)
    lengths = trackers.numbers(records, length_field) if length_field else np.ones(len(found))
    if top:
      kept = np.argsort(-found, kind='stable')[: max(round(top * len(found)), 1)]
      return np.isin(np.arange(len(found)), kept).astype(np.float32)
    return return_weights(found, lengths, temperature=temperature).astype(np.float32)

  return Curriculum(init=init, propose=lambda state, request: drawn(state, request, repeated=True))


def return_weights(
  returns: np.ndarray, lengths: np.ndarray, *, temperature: float = 0.1
) -> np.ndarray:
  """Probabilities proportional to L exp(g / temperature), g the returns scaled to [0, 1], f64[D].

  g = (G - min G) / (max G - min G), and 0 for all where the returns are equal. Every step of a row has
  the same weight, so the row has L times that (arXiv:2306.13085).

  >>> print(return_weights(np.array([0.0, 0.5, 1.0]), np.array([10, 10, 5])).round(5))
  [9.000e-05 1.330e-02 9.866e-01]
  """
  returns = np.asarray(returns, np.float64)
  spread = np.ptp(returns)
  scaled = (returns - returns.min()) / spread if spread > 0 else np.zeros(len(returns))
  weights = np.asarray(lengths, np.float64) * np.exp((scaled - 1) / temperature)
  return weights / weights.sum()


TABLE = table(
  'curricula',
  epochs,
  uniform,
  mixed,
  vade,
  spo,
  window,
  target,
  budget,
  v0,
  stages,
  sec,
  revisit,
  returns,
)
Part = Annotated[Curriculum, TABLE]
