from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import divergences, pair_scores, preference_losses
from polgrad.methods.base import Method, choice
from polgrad.registry import part


@choice('second', {False: (), True: ('alpha',)})
def tdpo(*, beta: float = 0.1, alpha: float = 0.5, second: bool = False) -> Method:
  """TDPO (arXiv:2404.11999): DPO with a token-level KL from the reference in its margin.

      loss = mean over pairs of softplus(-beta (h - d))
      d = K_l - K_w  (TDPO1)  or  alpha (K_l - sg K_w)  (TDPO2, `second`)
      K = sum over the tokens of a completion of sum_v ref(v) log(ref(v) / pi(v))

  h is the margin of `dpo`. TDPO2 without gradient through K_w only keeps the rejected completion near
  the reference; alpha = 0 is DPO. With Bradley-Terry labels of a reward r, TDPO1 is minimal at
  pi(token) = reference(token) exp(E_reference[r | token] / beta) / Z after each prefix. Every step has a
  forward pass of the reference, whose whole distribution is compared, so the reference is the anchor
  `teacher`.

  Args:
    beta: coefficient of the KL to the reference.
    alpha: of TDPO2, the coefficient of the KLs' difference.
    second: TDPO2 in place of TDPO1; the authors prefer it at high learning rates.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(
        pair_scores.divergence_corrected_sum,
        coefficient=alpha if second else 1.0,
        detach_preferred=second,
      ),
      link=part(preference_losses.logistic),
      beta=beta,
      stats={'reference_kl': part(divergences.forward_kl)},
    ),
    anchors={'teacher': part(optim.fixed)},
  )
