from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation, implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def slic() -> Method:
  """SLiC-HF (arXiv:2305.10425): hinge on log-probs, and likelihood of the chosen completion.

  loss = mean over pairs of max(0, 1 - log pi(chosen) + log pi(rejected)) + 0.1 * NLL(chosen); sums
  over tokens, no reference. Confidence: form as in HALOs (code), the constants 1 and 0.1 from memory.
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.WeightedSum,
      streams={
        'margin': weighted(
          1.0,
          part(
            objectives.Pairwise,
            score=part(implicit_rewards.logp_sum),
            link=part(preference_losses.hinge, threshold=1.0),
          ),
        ),
        'likelihood': weighted(
          0.1,
          part(
            objectives.Supervised,
            aggregation=part(aggregation.sequence_sum),
            preferred_only=True,
          ),
        ),
      },
    ),
  )
