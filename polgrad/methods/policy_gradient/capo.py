from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, logit_stats, selections, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def capo(
  *, step_size: float = 1.5e-5, limit_objective: float = 0.01, limit_divergence: float = 1e-4
) -> Method:
  """CAPO (arXiv:2510.00819): tokens whose own step would change too much are left out.

      loss = -mean over sequences of the mean of r A over kept tokens

  r = pi / pi_old, and A is the group-normalised reward. The rule looks at the step of size
  `step_size` that a token alone would make in the last layer. A token is kept if this step changes
  the objective by less than `limit_objective` and the policy by a KL of less than
  `limit_divergence`, both to second order. As in the authors' code, dropped tokens also leave the
  denominator.

  Differences: The step is that of gradient descent instead of Adam, and the whole vocabulary is
  used instead of the top k tokens.

  Args:
    step_size: learning rate of the step that is modelled; it does not set that of the run.
    limit_objective: largest change of the objective, in units of the advantage.
    limit_divergence: largest KL of the step, in nats.

  Confidence: CODE (rule, constants), DERIVED (curvature).
  """
  kept = part(
    selections.curvature,
    learning_rate=step_size,
    limit_objective=limit_objective,
    limit_divergence=limit_divergence,
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
