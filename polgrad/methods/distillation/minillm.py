from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, divergences, ratios, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted
from polgrad.sampling import behavior_policies


def minillm(
  *, teacher_weight: float = 0.2, eps: float = 0.2, discount: float = 0.95, epochs: int = 4
) -> Method:
  """MiniLLM as released (arXiv:2306.08543): the reverse KL of sequences by a policy gradient.

      loss = token mean of max(-r A, -clip(r, 1 - eps, 1 + eps) A) + KL(S || T)
      A_t = whitened sum_{s >= t} d^(s - t) r_s / n_t,   r_s = 2 (log T - log S)(y_s)
      r = S / ((1 - w) S_old + w T)   at the sampled token

  n_t is the number of tokens from t on. Samples are drawn token by token from the mixture
  (1 - w) S + w T, so r is both the ratio to the old student and the importance weight of the mixture.
  KL(S || T) is that of the next token, over the whole vocabulary. r_s is clipped to +-100, and the
  student in it is the one before the updates on the batch.

  Differences: The paper's gradient is `minillm_paper`; here returns are discounted and divided by n_t,
  and the reward of a token itself counts twice, in A and in the exact KL. The release also whitens over
  padding, and adds the likelihood of a plain-text corpus.

  Args:
    teacher_weight: w, in [0, 1).
    eps: distance of the clipping bounds from 1.
    discount: d, factor per token.
    epochs: updates on a batch.

  Confidence: CODE.
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=1,
      behavior_policy=part(behavior_policies.teacher_mixture, teacher_weight=teacher_weight),
      recompute_proximal=True,
    ),
    credit=part(
      credit.teacher_returns,
      discount=discount,
      per_token=True,
      scale=0.5,
      clip=100.0,
      normalizer=part(advantages.whiten),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      proximal=part(ratios.behavior),
      aggregation=part(aggregation.token_mean),
      penalties={'single_step': weighted(1.0, part(divergences.reverse_kl))},
    ),
    anchors={'teacher': part(optim.fixed)},
    epochs=epochs,
    restart=True,
    learns='imitate',
  )
