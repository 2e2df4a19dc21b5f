from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def rpo(*, beta: float = 0.5, nll_coefficient: float = 0.2, per_token: bool = True) -> Method:
  """RPO (arXiv:2405.16436): DPO, and likelihood of the chosen completion as a regulariser.

      loss = mean over pairs of softplus(-beta h) - nll_coefficient (mean over chosen rows of l_w)
      h = log(pi / reference)(chosen) - log(pi / reference)(rejected)

  l_w is the mean log-prob per token of the chosen completion, or with per_token=False the sum. Against
  the worst reward that agrees with the data, the likelihood of the chosen completions is what pessimism
  adds: it keeps mass away from completions that the data do not have.

  Differences: the authors' code for the alignment handbook has the sum, with the coefficient eta beta:
  per_token=False, beta=0.01, nll_coefficient=0.00005. The loss of iterative reasoning preference
  optimisation (arXiv:2404.19733) is beta=0.1, nll_coefficient=1.

  Args:
    beta: coefficient of the KL to the reference.
    nll_coefficient: of the negative log-likelihood; 0 is DPO.
    per_token: whether l_w is the mean over tokens; the sum otherwise.

  Confidence: CODE (constants as in the authors' code for OpenRLHF).
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.WeightedSum,
      streams={
        'preference': weighted(
          1.0,
          part(
            objectives.Pairwise,
            score=part(implicit_rewards.log_ratio_sum),
            link=part(preference_losses.logistic),
            beta=beta,
          ),
        ),
        'likelihood': weighted(
          nll_coefficient,
          part(
            objectives.Supervised,
            aggregation=part(aggregation.sequence_mean if per_token else aggregation.sequence_sum),
            preferred_only=True,
          ),
        ),
      },
    ),
    anchors={'reference': part(optim.fixed)},
  )
