from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, pair_weights, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def sem_dpo(*, beta: float = 0.1, alpha: float = 1.0) -> Method:
  """Sem-DPO (arXiv:2507.20133): DPO with less weight on pairs that are far from their prompt in meaning.

      loss = mean over pairs of w softplus(-beta h),  w = exp(-alpha (1 - similarity))

  h is the margin of `dpo`. `similarity`, a field of every record, is the cosine between the embeddings
  of the prompt and of the chosen completion by a frozen encoder. alpha = 0 is DPO.

  Args:
    beta: coefficient of the KL to the reference.
    alpha: how much less a pair counts that is far away; the paper's value is not known to us.

  Confidence: PAPER (formula, as a survey gives it), MEMORY (constants).
  """
  return Method(
    collect=partial(collect.Preferences, numbers={'similarity': 'similarity'}),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=beta,
      weights={'semantic': part(pair_weights.semantic, alpha=alpha)},
    ),
    anchors={'reference': part(optim.fixed)},
  )
