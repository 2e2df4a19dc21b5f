from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation, implicit_rewards, preference_losses, score_shapes
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def orpo(*, odds_coefficient: float = 0.1) -> Method:
  """ORPO (arXiv:2403.07691): likelihood of the chosen completion, and a logistic loss on the odds.

      loss = mean over chosen rows of -l_w + odds_coefficient (mean over pairs of softplus(-(o_w - o_l)))
      o = log(p / (1 - p)), p = exp(l)

  l is the mean log-prob per token of a completion, so o is its log-odds. There is no reference.

  Differences: The authors take the likelihood also of the prompt's tokens, and average it over all
  tokens of a batch. Here it is of the completion, and each row counts the same.

  Args:
    odds_coefficient: of the odds loss, lambda in the paper; the released runs have 0.1 and 0.05.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.WeightedSum,
      streams={
        'preference': weighted(
          odds_coefficient,
          part(
            objectives.Pairwise,
            score=part(implicit_rewards.logp_mean),
            link=part(preference_losses.logistic),
            shape=part(score_shapes.log_odds),
          ),
        ),
        'likelihood': weighted(
          1.0,
          part(
            objectives.Supervised, aggregation=part(aggregation.sequence_mean), preferred_only=True
          ),
        ),
      },
    ),
  )
