from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part
from polgrad.sampling import behavior_policies


def nash_ema_pg(*, tau: float = 0.008, decay: float = 0.99) -> Method:
  """Nash-EMA-PG (arXiv:2312.00886): the policy gradient of the probability to beat an averaged policy.

      loss = -mean over rows of sum_t A_t log pi(y_t)
      A_t = P(y beats y') - 1/2 - tau sum over s >= t of log(pi / reference)(y_s)
      y ~ pi,   y' ~ the policy with the moving average of the parameters

  The phase's `comparison` gives P. The average is the anchor `opponent`.

  Args:
    tau: coefficient of the KL to the reference, in units of the probability.
    decay: of the moving average, per update; 0 is self-play.

  Confidence: PAPER (form), MEMORY (decay).
  """
  to_go = part(credit.reward_to_go, normalizer=part(advantages.identity), kl_coefficient=tau)
  return Method(
    collect=partial(
      collect.Rollouts,
      compare=('baseline_wins',),
      baseline_samples=1,
      baseline_policy=part(behavior_policies.opponent),
    ),
    credit=part(credit.of_wins, credit=to_go, against='baseline'),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    anchors={'reference': part(optim.fixed), 'opponent': part(optim.ema, decay=decay)},
  )
