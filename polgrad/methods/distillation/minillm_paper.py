from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import aggregation, divergences, ratios, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted
from polgrad.sampling import behavior_policies


def minillm_paper(*, teacher_weight: float = 0.2, per_token: bool = False) -> Method:
  """MiniLLM as written (arXiv:2306.08543): the exact gradient of the reverse KL of sequences.

      loss = mean over rows of sum_t [KL(S || T)_t - r_t A_t],   A_t = sum_{s > t} (log T - log S)(y_s)

  r_t = S / ((1 - w) S_old + w T) at the sampled token: samples are drawn token by token from the
  mixture (1 - w) S + w T. KL(S || T)_t is that of token t, over the whole vocabulary. So the effect
  of a token on its own reward is exact, and that on later ones is sampled. With w = 0 the expected
  gradient is exactly that of KL(S || T) of whole sequences. Without A this is `on_policy_distillation`.

  Differences: r_t corrects the distribution of token t alone and not that of its prefix, as in the
  paper. The exact part has no such weight.

  Args:
    teacher_weight: w, in [0, 1).
    per_token: divide A_t by the number of tokens after t, as the paper does against short answers; the
      gradient is then no longer that of the KL.

  Confidence: CODE (parts), DERIVED (as one loss).
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=1,
      behavior_policy=part(behavior_policies.teacher_mixture, teacher_weight=teacher_weight),
      recompute_proximal=True,
    ),
    credit=part(credit.teacher_returns, own=False, per_token=per_token),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.importance_weighted),
      proximal=part(ratios.behavior),
      aggregation=part(aggregation.sequence_sum),
      penalties={'single_step': weighted(1.0, part(divergences.reverse_kl))},
    ),
    anchors={'teacher': part(optim.fixed)},
    restart=True,
    learns='imitate',
  )
