"""Credit of tokens: advantages that differ between the tokens of one turn."""

from typing import Literal

import jax.numpy as jnp

from polgrad.credit.base import (
  Estimator,
  critic,
  k1,
  kl_requires,
  named,
  to_tokens,
  token_rewards,
  with_targets,
)
from polgrad.losses import advantages as advantage_functions
from polgrad.losses import conflicts, process_rewards, returns, turns
from polgrad.losses.advantages import (
  NormalizerPart,
  group_mean,
  leave_one_out,
  whiten,
)
from polgrad.registry import Fraction, NotNegative, Positive, call
from polgrad.types import STREAMS


def decoupled(
  *,
  discount: float = 1.0,
  trace: Fraction = 0.95,
  value_trace: Fraction = 1.0,
  length_scale: NotNegative = 0.0,
  normalizer: NormalizerPart = whiten,
  kl_coefficient: float = 0.0,
) -> Estimator:
  """GAE with one lambda for the policy and another for the critic (VC-PPO, arXiv:2503.01491).

  Advantages have the lambda `trace`, targets of the critic `value_trace`. With value_trace = 1 a target
  is the sum of the rewards from the token on, which has no bias: a critic that is wrong everywhere by
  the same number does not stay so. With `length_scale` > 0 the lambda of the policy is that of
  `returns.length_adaptive_trace` (VAPO, arXiv:2504.05118), and `trace` is not read.

  Args:
    discount: factor of rewards and values that are one token later.
    trace: lambda of the advantages.
    value_trace: lambda of the targets.
    length_scale: alpha of 1 - 1 / (alpha L), with L the tokens of the row; 0: lambda is `trace`.
    normalizer: of the advantages.
    kl_coefficient: of a penalty in the reward of every token, log pi - log reference in nats.
  """

  def apply(batch, state):
    rewards, values = token_rewards(batch, kl_coefficient), batch.old_values
    own = trace
    if length_scale:
      own = returns.length_adaptive_trace(batch.mask, scale=length_scale)
    advantages, errors = (
      returns.gae(rewards, values, batch.mask, discount=discount, trace=x)
      for x in (own, value_trace)
    )
    return with_targets(batch, advantages, errors + values, normalizer), state

  return critic(apply, kl_requires(kl_coefficient))


def hybrid(
  *,
  discount: float = 1.0,
  trace: Fraction = 0.97,
  value_trace: Fraction = 1.0,
  offline_trace: Fraction = 0.0,
  normalizer: NormalizerPart = whiten,
  kl_coefficient: float = 0.0,
) -> Estimator:
  """GAE whose critic has other targets in states of the data: HNPG (arXiv:2311.08384).

  Rows in the stream of demonstrations begin in a state of the data (`collect.Restarts`). The target of
  the critic there has the lambda `offline_trace`; with 0 it is r_t + discount V_{t+1}, one step of the
  Bellman equation. In other rows it has `value_trace`; with 1 it is the sum of the rewards.

  Args:
    discount: factor of rewards and values that are one token later.
    trace: lambda of the advantages, in all rows.
    value_trace: lambda of the targets in rows from the prompt.
    offline_trace: lambda of the targets in rows from states of the data.
    normalizer: of the advantages.
    kl_coefficient: of a penalty in the reward of every token, log pi - log reference in nats.
  """

  def apply(batch, state):
    rewards, values = token_rewards(batch, kl_coefficient), batch.old_values
    given = batch.stream == STREAMS.index('demonstration')
    targets = jnp.where(given, offline_trace, value_trace).astype(values.dtype)
    advantages, errors = (
      returns.gae(rewards, values, batch.mask, discount=discount, trace=x) for x in (trace, targets)
    )
    return with_targets(batch, advantages, errors + values, normalizer), state

  return critic(apply, kl_requires(kl_coefficient) | {'stream'})


BASELINES = {
  'step': process_rewards.without_step_baseline,
  'token': process_rewards.without_token_baseline,
}


def process_min(
  *,
  temperature: Positive = 0.1,
  baseline: Literal['token', 'step'] = 'token',
  outcome: NotNegative = 1.0,
  drop_ends: bool = True,
  kl_coefficient: float = 0.0,
) -> Estimator:
  """Advantages from scores of steps, of which the worst one counts (PURE, arXiv:2504.15275).

  The reward of a step is that of `process_rewards.min_form` less its baseline. The last token also gets
  `outcome` times the reward of the row less the mean of the other rows of its group, and every token
  -kl_coefficient k1. Their sums from each token on are the advantages, which are normalised over the
  tokens of the batch, with the standard deviation that divides by their number.

  Needs a collector that scores parts of completions (`spans=True`), with scores in [-1, 1].

  Args:
    temperature: of the weights of steps, unit of the scores.
    baseline: 'token' or 'step', see `process_rewards`.
    outcome: weight of the reward of the row; 0 leaves it out.
    drop_ends: whether the last token of every step and of the row get the advantage 0 and are left out
      of the normalisation, as in the authors' code.
    kl_coefficient: of k1 = log pi - log reference, nats.
  """

  def apply(batch, state):
    inside = batch.mask & (batch['span_ids'] >= 0)
    arrays = batch['span_scores'], batch['span_ids'], batch.mask
    earned = process_rewards.min_form(*arrays, temperature=temperature)
    earned = BASELINES[baseline](earned, *arrays[1:], batch.group_ids, batch.valid)
    if outcome:
      centred = outcome * leave_one_out(batch.rewards, batch.group_ids, batch.valid)
      earned += returns.place_last(centred, batch.mask)
    if kl_coefficient:
      earned -= kl_coefficient * k1(batch)
    kept = batch.mask
    if drop_ends:
      last = returns.place_last(jnp.ones(len(batch.mask)), batch.mask) > 0
      kept = kept & ~last & ~turns.ends(batch['span_ids'], inside)
    advantages = whiten(returns.reward_to_go(earned, batch.mask), kept, ddof=0)
    return batch.with_arrays(advantages=advantages), state

  requires = kl_requires(kl_coefficient) | {'span_ids', 'span_scores'}
  return Estimator(apply=apply, requires=requires)


def implicit_process(
  *,
  anchor: str = 'reward_model',
  process: NotNegative = 1.0,
  outcome: NotNegative = 1.0,
  discount: float = 1.0,
  threshold: float = 0.5,
  normalizer: NormalizerPart = whiten,
) -> Estimator:
  """Advantages from a reward model that is a language model (PRIME, arXiv:2502.01456).

      q_t = log pi_anchor - log reference, divided by the largest |sum of q from a token on| of the batch
      A_t = process (sum of q~ from t on) + outcome (R - mean of R over the other rows), whitened
      q~_t = n / (n - 1) q_t - (sum over the n rows of the group of their mean q) / (n - 1)

  If the anchor is trained so that the sum of beta q over a row predicts whether it is right, q_t says
  how much token t changes that prediction. The `label` of a row, for the loss of the anchor, is whether
  it is right.

  Args:
    anchor: name of the anchor that is the reward model.
    process: weight of the rewards of tokens.
    outcome: weight of the reward of the row.
    discount: of the rewards of later tokens.
    threshold: a row is right if its reward exceeds this.
    normalizer: of the advantages.
  """

  def apply(batch, state):
    mask, valid, groups = batch.mask, batch.valid, batch.group_ids
    gap = jnp.where(mask, batch[f'{anchor}_logp'] - batch.reference_logp, 0)
    scores = process_rewards.leave_one_out(process_rewards.bounded(gap, mask), mask, groups, valid)
    found = process * returns.reward_to_go(scores, mask, discount=discount)
    centred = returns.place_last(leave_one_out(batch.rewards, groups, valid), mask)
    found += outcome * returns.reward_to_go(centred, mask, discount=discount)
    right = (batch.rewards > threshold).astype(jnp.float32)
    return batch.with_arrays(advantages=normalizer(found, mask), label=right), state

  return Estimator(
    apply=apply,
    requires=frozenset({f'{anchor}_logp', 'reference_logp'}),
    provides=frozenset({'advantages', 'label'}),
  )


def spans_generalized(
  *,
  discount: float = 1.0,
  trace: Fraction = 0.95,
  kl_coefficient: NotNegative = 0.05,
  kl_target: Positive = 6.0,
  horizon: Positive = 10000.0,
  kl: Literal['sampled', 'exact'] = 'sampled',
  normalizer: NormalizerPart = whiten,
) -> Estimator:
  """GAE whose rewards of tokens are the scores of the parts that they are in (Text2Grad,
  arXiv:2505.22338).

      r_t = score_t - beta KL_t
      KL_t = (log pi - log reference)(y_t), or sum_v pi(v) log(pi(v) / reference(v)) if it is exact

  Tokens in no part have the score 0. beta is adapted after every batch (arXiv:1909.08593): beta <- beta
  (1 + clip(KL / kl_target - 1, -.2, .2) rows / horizon), where KL is the mean over rows of the sums of
  KL_t. State: beta.

  Needs a critic, and a collector that scores parts of completions (`spans=True`). The rewards of rows
  are not read.

  Args:
    discount: factor of rewards and values that are one token later.
    trace: lambda.
    kl_coefficient: beta of the first batch; 0 is no penalty.
    kl_target: KL of a row that is wanted, nats.
    horizon: rows after which beta has changed by about its relative error.
    kl: 'sampled' reads log-probs of the sampled token under the anchor `reference`; 'exact' reads the
      statistic `old_kl` of the collector's `stats`, for which the reference is the anchor `teacher`.
    normalizer: of the advantages.
  """
  exact = kl == 'exact'

  def apply(batch, state):
    mask, values = batch.mask, batch.old_values
    rewards = jnp.where(mask & (batch['span_ids'] >= 0), batch['span_scores'], 0)
    if kl_coefficient:
      gap = jnp.where(mask, batch['old_kl'], 0) if exact else k1(batch)
      rewards -= state * gap
      rows = jnp.sum(jnp.any(mask, axis=1))
      error = jnp.sum(gap) / jnp.maximum(rows, 1) / kl_target - 1
      state = state * (1 + jnp.clip(error, -0.2, 0.2) * rows / horizon)
    advantages = returns.gae(rewards, values, mask, discount=discount, trace=trace)
    return with_targets(batch, advantages, advantages + values, normalizer), state

  read = {'old_kl'} if exact and kl_coefficient else kl_requires(kl_coefficient and not exact)
  return critic(apply, read | {'span_ids', 'span_scores'})._replace(
    init=lambda: jnp.asarray(kl_coefficient, jnp.float32), scored=frozenset()
  )


def weighed_by_network(*, network: str = 'critics') -> Estimator:
  """A_t = the score that a network gives the token, for example `networks.Critics` (arXiv:2310.09971).

  With the surrogate `reinforce` the scores are weights of log-probs. The reward is only read by the
  network. Tokens of a row that is not valid get 0.

  Args:
    network: its name.
  """

  def apply(batch, state):
    kept = batch.mask & batch.valid[:, None]
    return batch.with_arrays(advantages=jnp.where(kept, batch[f'{network}_scores'], 0.0)), state

  return Estimator(
    apply=apply, requires=frozenset({f'{network}_scores'}), scored=frozenset({'rewards'})
  )


def conflict_aware(
  *,
  advantage: advantage_functions.Part = group_mean,
  factor: NotNegative = 2.0,
  entropy_limit: NotNegative = 0.7,
  entropy_penalty: NotNegative = 0.1,
) -> Estimator:
  """Advantages that protect the tokens which good and bad rows share (GTPO, arXiv:2508.03772).

      A_t = weight_t (A - entropy_penalty H)   where H <= entropy_limit, else 0

  H is the mean entropy of the tokens of the row, and the weights are those of
  `conflicts.conflict_weights`, by the sign of A before H is subtracted. Needs the statistic
  `old_entropy` of the policy, from the collector's `stats`.

  Args:
    advantage: A of rows.
    factor: weight of the conflicting tokens of good rows; those of bad rows get 0.
    entropy_limit: largest H of a row that is trained on, nats; inf is none.
    entropy_penalty: gamma in the paper.
  """

  def apply(batch, state):
    mask = batch.mask
    gains = jnp.where(batch.valid, call(advantage, batch), 0)
    weights = conflicts.conflict_weights(batch.tokens, mask, gains, batch.group_ids, factor=factor)
    entropy = jnp.sum(jnp.where(mask, batch['old_entropy'], 0), axis=1)
    entropy = entropy / jnp.maximum(jnp.sum(mask, axis=1), 1)
    shaped = jnp.where(entropy <= entropy_limit, gains - entropy_penalty * entropy, 0)
    return batch.with_arrays(advantages=weights * to_tokens(shaped, mask)), state

  return Estimator(apply=apply, requires=named(advantage) | {'old_entropy', 'tokens'})
