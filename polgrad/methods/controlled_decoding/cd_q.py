from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, logit_stats, prefix_values
from polgrad.methods.base import Method
from polgrad.registry import part
from polgrad.sampling import behavior_policies


def cd_q(*, minibatches: int = 4) -> Method:
  """CD-Q (arXiv:2310.17022): a scorer of prefixes learns from its own values one token later.

      loss = token mean of (V(x, y_1..t) - v_t)^2 / 2
      v_t = sum_z teacher(z | x, y_1..t) V_target(x, y_1..t z),   R at the last token

  The trained model is a scorer, as in `cd_fudge`. The sum is over what the teacher would do next, so
  rows from any policy give the teacher's values; here the teacher samples them. V_target is the scorer
  when the batch was collected: the targets of all updates on a batch are fixed.

  Differences: the paper's target copy is slow; this one is renewed with each batch. The sum is over the
  whole vocabulary. The scorer begins as the model itself.

  Args:
    minibatches: updates on each batch, and so between two renewals of the target.

  Confidence: PAPER (formula, as notes on the paper give it), MEMORY (constants).
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      behavior_policy=part(behavior_policies.teacher),
      temperature=1.0,
      stats={'state_value': part(logit_stats.expected_logit)},
    ),
    objective=part(
      objectives.PrefixValues,
      target=part(prefix_values.bootstrapped),
      aggregation=part(aggregation.token_mean),
    ),
    anchors={'teacher': part(optim.fixed)},
    minibatches=minibatches,
    learns='imitate',
  )
