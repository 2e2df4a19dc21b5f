from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, logit_stats, selections, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def capo() -> Method:
  """CAPO (arXiv:2510.00819): tokens whose own step would jump or leave the policy are left out.

  loss = mean over sequences of the mean of -r A over kept tokens. A token is kept if its own step in
  the last layer changes the objective by less than 0.01 and the policy by less than 1e-4 nats, to
  second order with eta = 1.5e-5. Dropped tokens also leave the denominator, as in the authors' code.
  Ours: the step of gradient descent for Adam's, and the whole vocabulary for the top k.

  Confidence: CODE (rule, constants), DERIVED (curvature).
  """
  kept = part(
    selections.curvature, learning_rate=1.5e-5, limit_objective=0.01, limit_divergence=1e-4
  )
  statistics = (logit_stats.score_norm, logit_stats.score_fisher, logit_stats.hidden_norm)
  return Method(
    collect=partial(collect.Rollouts, stats={s.__name__: part(s) for s in statistics}),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.importance_weighted),
      aggregation=part(aggregation.sequence_mean),
      selections={'kept': kept},
      only='kept',
    ),
    minibatches=2,
  )
