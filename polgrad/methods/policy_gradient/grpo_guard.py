from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, divergences, ratios, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def grpo_guard() -> Method:
  """GRPO-Guard (arXiv:2510.22319): log-ratios are centred before they are clipped.

  loss = mean over sequences of -min(r A, clip(r, 0.8, 1.2) A), log r = log pi - log pi_old +
  KL(pi_old || pi). Under pi_old a log-ratio has the mean -KL, so a symmetric range rarely binds
  above; with the KL added, exact over the vocabulary and detached, the mean is 0. The paper has this
  for flow matching, where it also scales by the known variance; this is its form for any policy,
  with scale 1. The anchor `teacher` is pi_old: it follows the policy after the updates of a rollout.

  Confidence: CODE (flow matching), DERIVED (this form).
  """
  minibatches = 4
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      ratio=part(ratios.centered, scale=1.0),
      aggregation=part(aggregation.sequence_mean),
      stats={'old_kl': part(divergences.forward_kl)},
    ),
    anchors={'teacher': part(optim.sync, every=minibatches)},
    minibatches=minibatches,
  )
