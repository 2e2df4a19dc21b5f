from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation, implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def slic(
  *, threshold: float = 1.0, nll_coefficient: float = 0.1, per_token: bool = False
) -> Method:
  """SLiC-HF (arXiv:2305.10425): hinge on log-probs, and likelihood of the chosen completion.

      loss = mean over pairs of max(0, threshold - log pi(chosen) + log pi(rejected))
             - nll_coefficient (mean over pairs of log pi(chosen))

  The log-probs are sums over the tokens of a completion. There is no reference.

  Differences: the paper takes the likelihood of the supervised target, which need not be the chosen
  completion. TRL's hinge loss is `gpo(link='hinge')`: it compares log-ratios to a reference.

  Args:
    threshold: margin at which a pair has loss 0, in nats.
    nll_coefficient: of the negative log-likelihood of the chosen completion.
    per_token: whether that likelihood is the mean over the tokens, as in HALOs; the sum otherwise.

  Confidence: CODE (form as in HALOs), MEMORY (the constants 1 and 0.1).
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
            link=part(preference_losses.hinge, threshold=threshold),
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
  )
