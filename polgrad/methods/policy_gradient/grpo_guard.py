from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, divergences, ratios, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def grpo_guard(*, eps: float = 0.2) -> Method:
  """GRPO-Guard (arXiv:2510.22319): log-ratios are centred before they are clipped.

      loss = -mean over sequences of token means of min(r A, clip(r, 1 - eps, 1 + eps) A)
      log r = log pi - log pi_old + sg(KL(pi_old || pi))

  A is the group-normalised reward. The mean of log pi - log pi_old under pi_old is -KL, so a
  symmetric range rarely clips on the upper side. Adding the KL, which is exact over the vocabulary,
  makes this mean 0. pi_old is the anchor `teacher`, a copy of the policy that is renewed after the
  updates of a rollout.

  Differences: The paper has this for flow matching, where it also scales log r by the known
  variance. Here it is the form for any policy, with scale 1.

  Args:
    eps: distance of the clipping bounds from 1.

  Confidence: CODE (flow matching), DERIVED (this form).
  """
  minibatches = 4
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      ratio=part(ratios.centered, scale=1.0),
      aggregation=part(aggregation.sequence_mean),
      stats={'old_kl': part(divergences.forward_kl)},
    ),
    anchors={'teacher': part(optim.sync, every=minibatches)},
    minibatches=minibatches,
  )
