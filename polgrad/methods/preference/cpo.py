from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation, implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def cpo(*, beta: float = 0.1, nll_coefficient: float = 1.0, label_smoothing: float = 0.0) -> Method:
  """CPO (arXiv:2401.08417): DPO with a uniform reference, and likelihood of the chosen completion.

      loss = mean over pairs of softplus(-beta (log pi(chosen) - log pi(rejected)))
             - nll_coefficient (mean over chosen rows of l_w)

  The log-probs of a pair are sums over tokens; l_w is the mean log-prob per token.

  Differences: TRL averages the likelihood over all tokens of a batch; here each row counts the same.
  The authors' repository has changed to `arpo` since.

  Args:
    beta: multiplies the difference of the log-probs.
    nll_coefficient: of the negative log-likelihood of the chosen completion.
    label_smoothing: probability that a label is wrong, in [0, 1/2].

  Confidence: CODE.
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
            score=part(implicit_rewards.logp_sum),
            link=part(preference_losses.logistic),
            beta=beta,
            label_smoothing=label_smoothing,
          ),
        ),
        'likelihood': weighted(
          nll_coefficient,
          part(
            objectives.Supervised, aggregation=part(aggregation.sequence_mean), preferred_only=True
          ),
        ),
      },
    ),
  )
