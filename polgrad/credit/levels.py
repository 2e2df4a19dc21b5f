"""Estimators with two comparisons: of rows and of prompts, or of modes and of answers."""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from polgrad.credit.base import Estimator, to_tokens
from polgrad.losses import strata
from polgrad.losses.groups import divide, joint, members, normalized, size, total
from polgrad.registry import AtLeastOne, NotNegative, Range

Ddof = Annotated[int, Range(at_least=0, at_most=1)]


def two_level(
  *,
  steepness: float = 5.0,
  middle: float = 1.0,
  local: Literal['rewarded', 'informative', 'all'] = 'rewarded',
  consistent: bool = False,
  ddof: Ddof = 1,
  eps: float = 1e-6,
) -> Estimator:
  """Advantages of rows inside their group, of groups inside the batch, and how much the former count:
  COPO (arXiv:2508.04138).

  `advantages` is the group-normalised reward. `global_advantages` is the mean reward of the group,
  normalised over the groups of the batch, so groups whose rows are all right or all wrong learn too.
  `local_weight` is w = sigmoid(steepness (H - middle)), with H the entropy in bits of the answers of the
  group, the feature `answer_term`: where the rows agree, the group learns as a whole.

  Args:
    steepness: of w, per bit.
    middle: entropy at which both count the same, bits.
    local: rows whose w is not set to 0: those with a reward that is not 0, those with a group advantage
      that is not 0, or all.
    consistent: whether the mean reward of a group is multiplied by 1 - (1 - 1/G) H / log2 G, which is
      1 where its G rows agree and 1/G where no two do.
    ddof: 1 divides sums of squares by the number of rows or groups - 1, 0 by their number.
    eps: added to the standard deviations, in units of the reward.
  """

  def apply(batch, state):
    rewards, ids, valid = batch.rewards, batch.group_ids, batch.valid
    group = members(ids, valid)
    entropy = strata.answer_entropy(batch['answer_term'], ids, valid)
    inside = normalized(rewards, group, ddof, eps)
    of_groups = divide(total(rewards, group), size(group))
    if consistent:
      rows = jnp.maximum(size(group), 1).astype(rewards.dtype)
      of_groups *= 1 - (1 - 1 / rows) * divide(entropy, jnp.log2(rows))
    across = strata.across_prompts(of_groups, ids, valid, ddof=ddof, eps=eps)
    weight = jax.nn.sigmoid(steepness * (entropy - middle))
    counted = {'rewarded': rewards != 0, 'informative': inside != 0, 'all': valid}[local]
    return batch.with_arrays(
      advantages=to_tokens(inside, batch.mask),
      global_advantages=to_tokens(across, batch.mask),
      local_weight=jnp.where(counted & valid, weight, 0.0),
    ), state

  return Estimator(
    apply=apply,
    requires=frozenset({'answer_term'}),
    provides=frozenset({'advantages', 'global_advantages', 'local_weight'}),
  )


def modes(
  *,
  judged: AtLeastOne = 1,
  tie: NotNegative = 0.01,
  own: NotNegative = 0.3,
  ddof: Ddof = 0,
  eps: float = 1e-6,
) -> Estimator:
  """One advantage for the choice of a mode, another one for the answer: HiPO (arXiv:2509.23967).

  The first `judged` tokens of a row choose the mode, and get `strata.mode_choice`. The other tokens get
  the reward normalised over the rows of the group with the same mode, the feature `mode_term`.

  Args:
    judged: number of tokens in which the mode is chosen.
    tie: how much better the mode 'on' must be, in units of its mean reward.
    own: weight of the reward of the row itself in the advantage of the choice.
    ddof: 1 divides sums of squares by the number of rows - 1, 0 by their number.
    eps: added to the standard deviations, in units of the reward.
  """

  def apply(batch, state):
    kind = batch['mode_term'] > 0
    knobs = dict(ddof=ddof, eps=eps)
    choice = strata.mode_choice(
      batch.rewards, batch['mode_term'], batch.group_ids, batch.valid, tie=tie, own=own, **knobs
    )
    same = members(joint(batch.group_ids, kind), batch.valid)
    answer = normalized(batch.rewards, same, ddof, eps)
    number = jnp.cumsum(batch.mask, axis=1)  # of a token of the policy in its row, from 1
    per_token = jnp.where(number <= judged, choice[:, None], answer[:, None])
    return batch.with_arrays(advantages=jnp.where(batch.mask, per_token, 0.0)), state

  return Estimator(apply=apply, requires=frozenset({'mode_term'}))
