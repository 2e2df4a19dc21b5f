"""Pairs that a policy makes from samples and given completions, by its implicit rewards."""

import jax.numpy as jnp

from polgrad.credit.base import Estimator
from polgrad.losses.groups import Groups, everyone, maximum, members, minimum, rank, total
from polgrad.registry import Fraction, NotNegative
from polgrad.types import STREAMS, Array


def bootstrapped_pairs(
  *, fraction: Fraction = 0.7, ensemble: Fraction = 0.5, least: NotNegative = 1e-3
) -> Estimator:
  """Two pairs a prompt, of which those with large implicit margins are kept: SeRA (arXiv:2410.09362).

  A group holds samples, and the chosen and the rejected completion of its record, which are the *given*
  pair (`given_side`). R is the summed log-ratio of the anchor `previous` to the reference. The row with
  the largest R and the one with the smallest, samples or not, are the *bootstrapped* pair (`pair_side`).
  The margin of a pair is

      ensemble h(policy) + (1 - ensemble) h(previous),  h(p) = difference of log(p / reference)

  Of all pairs of the batch the `fraction` with the largest margins is kept. A side is 1 for the better
  row of a kept pair, -1 for the other one, and else 0; rows without a side leave the mask. As long as
  `previous` is the reference all R are 0: then there is no bootstrapped pair, and all given pairs are
  kept.

  Args:
    fraction: of the pairs; their number is rounded up.
    ensemble: weight of the policy in the margin.
    least: `previous` counts as the reference where no |R| of the batch is larger, nats.
  """

  def apply(batch, state):
    there = batch.valid & jnp.any(batch.mask, axis=1)
    group = members(batch.group_ids, there)
    before, now = (
      jnp.sum(jnp.where(batch.mask, batch[name] - batch.reference_logp, 0), axis=1)
      for name in ('previous_logp', 'proximal_logp')
    )
    # The candidates of a prompt: its own pair, and the extremes of all its rows.
    given = there & (batch.stream == STREAMS.index('demonstration'))
    own = _pair(given & (batch.label > 0.5), given & (batch.label <= 0.5), group)
    differ = maximum(before, group) > minimum(before, group)
    best, worst = (there & differ & (rank(x, group) == 0) for x in (-before, before))
    made = _pair(best, worst, group)

    # Both are ranked together; a pair is counted at its better row.
    margin = ensemble * now + (1 - ensemble) * before
    gaps = jnp.concatenate([total(side * margin, group) for side in (made, own)])
    pairs = jnp.concatenate([made, own]) > 0
    number = jnp.ceil(fraction * jnp.sum(pairs) * (1 - 1e-6))  # the factor makes up for rounding
    kept = pairs & (rank(-gaps, everyone(pairs)) < number)
    moved = jnp.any(there & (jnp.abs(before) > least))
    made_kept, own_kept = jnp.split(kept, 2)
    keep = lambda side, which: side * (total(which.astype(jnp.int32), group) > 0)
    made = jnp.where(moved, keep(made, made_kept), 0)
    own = jnp.where(moved, keep(own, own_kept), own)
    mask = batch.mask & ((made != 0) | (own != 0))[:, None]
    return batch.with_arrays(pair_side=made, given_side=own, mask=mask), state

  return Estimator(
    apply=apply,
    requires=frozenset({'proximal_logp', 'reference_logp', 'previous_logp', 'stream', 'label'}),
    provides=frozenset({'pair_side', 'given_side', 'mask'}),
    scored=frozenset({'group_ids'}),
  )


def _pair(better: Array, worse: Array, group: Groups) -> Array:
  """1, -1 or 0 for every row [B]; 0 in a group that lacks one of the two rows."""
  both = (total(better.astype(jnp.int32), group) > 0) & (total(worse.astype(jnp.int32), group) > 0)
  return (better.astype(jnp.float32) - worse.astype(jnp.float32)) * both
