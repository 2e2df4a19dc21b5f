from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part
from polgrad.sampling import behavior_policies


def nash_md_pg(*, tau: float = 0.008, reference_weight: float = 0.125) -> Method:
  """Nash-MD-PG (arXiv:2312.00886): the policy gradient of the probability to beat a mixture.

      loss = -mean over rows of sum_t A_t log pi(y_t)
      A_t = P(y beats y') - 1/2 - tau sum over s >= t of log(pi / reference)(y_s)
      y ~ pi,   y' ~ the normalised policy^(1 - w) reference^w, token by token

  The phase's `comparison` gives P. Each token is credited with the KL of itself and of later tokens,
  which has the expectation of crediting it with the KL of the whole answer and a smaller variance.

  Differences: TRL credits a token with its own log-ratio alone, which is biased for answers of more than
  one token: the objective's penalty `k2` in the place of `kl_coefficient`. TRL samples at
  temperature 0.9 and scores at 1.

  Args:
    tau: coefficient of the KL to the reference, in units of the probability.
    reference_weight: w of the reference in the opponent's mixture; 0 is self-play, 1 the reference.

  Confidence: CODE (TRL, EGPO), PAPER (constants).
  """
  to_go = part(credit.reward_to_go, normalizer=part(advantages.identity), kl_coefficient=tau)
  mixture = part(behavior_policies.geometric_mixture, reference_weight=reference_weight)
  return Method(
    collect=partial(
      collect.Rollouts, compare=('baseline_wins',), baseline_samples=1, baseline_policy=mixture
    ),
    credit=part(credit.of_wins, credit=to_go, against='baseline'),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    anchors={'reference': part(optim.fixed)},
  )
