import math
from functools import partial

from polgrad import collect, credit, metric_history, objectives
from polgrad.collect import replay
from polgrad.losses import advantages, aggregation, multipliers, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def confucius3(
  *, extra: float = 1.0, target: float = 0.3, eps: float = 0.2, recent: int = 4
) -> Method:
  """Confucius3-Math (arXiv:2506.18330): an entropy target, recent groups, weights by hardness.

      A_i = (1 + extra (1 - p_g)) (R_i - mean_g) / (std_g + 1e-6)
      loss = token mean of -min(r A, clip(r, 1 - eps, 1 + eps) A) - c H
      c <- clip(c + 0.001 (target - H), 0, 0.1) after every update

  p_g is the share of right answers to the prompt under the policy itself (policy-specific hardness
  weighting), and H the mean entropy (targeted entropy regularisation). A group whose rewards are all
  equal is replaced by the newest earlier group with different rewards (recent sample recovery). Such a
  group keeps the log-probs of the policy that sampled it, so r is the ratio to that policy.

  Differences: Unconfirmed. The paper names these three parts, and their formulas are not published;
  those here are ours.

  Args:
    extra: how much more a prompt counts that is never solved.
    target: entropy of the next token that is wanted, nats.
    eps: distance of the clipping bounds from 1.
    recent: earlier batches whose groups may come again.

  Confidence: MEMORY (names alone).
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      replay=recent,
      replay_fraction=1.0,
      replay_priority=part(replay.recovery),
      replay_exponent=math.inf,
      replay_into='dull',
    ),
    credit=part(
      credit.scaled,
      credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
      multiplier=part(multipliers.hardness, extra=extra),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
      penalties={'bonus': weighted(1.0, part(penalties.negative_entropy))},
      schedules={'bonus': part(metric_history.entropy_coefficient)},
      history={'entropy_coefficient': part(metric_history.entropy_control, target=target)},
    ),
    minibatches=2,
  )
