from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part
from polgrad.sampling import behavior_policies


def nash_mp(*, beta: float = 0.1, eta: float = 0.2, rate: float = 0.05) -> Method:
  """Nash mirror prox (arXiv:2505.19731): self-play against a slow copy, and near to it.

      loss = -mean over rows of sum_t A_t log pi(y_t)
      A_t = P(y beats y') - 1/2
            - sum over s >= t of [beta log(pi / reference) + (beta / eta) log(pi / slow)](y_s)
      y ~ pi,   y' ~ slow,   slow <- rate pi + (1 - rate) slow after every update

  The slow copy, the anchor `opponent`, is both the opponent and the centre of the proximal step. The
  phase's `comparison` gives P. The exact algorithm of the paper makes two such steps from one centre;
  see `tabular/games.py`.

  Args:
    beta: coefficient of the KL to the reference, in units of the probability.
    eta: step of the proximal point; a small one keeps the policy near the slow copy.
    rate: weight of the policy in the slow copy, per update; 1 with a large eta is plain self-play.

  Confidence: PAPER (exact algorithm), MEMORY (this form and its constants).
  """
  to_go = part(
    credit.reward_to_go,
    normalizer=part(advantages.identity),
    kl_coefficient=beta,
    anchors={'opponent': beta / eta},
  )
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
    anchors={'reference': part(optim.fixed), 'opponent': part(optim.ema, decay=1 - rate)},
  )
