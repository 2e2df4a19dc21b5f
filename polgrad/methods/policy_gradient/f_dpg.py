from polgrad import credit, objectives, optim
from polgrad.losses import aggregation, f_divergences, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def f_dpg(*, beta: float = 0.3, decay: float = 0.9) -> Method:
  """f-DPG (arXiv:2302.08215): the policy gradient of an f-divergence to a target distribution.

      loss = -mean over rows of A log pi(y),   A = -f'(pi / p) - b
      p = reference exp(R / beta) / Z

  p is the target distribution of whole rows, and b a moving average of -f'(pi / p) over earlier
  batches. The divergence is twice that of Jensen and Shannon, as in the authors' code:
  f'(t) = log t - log((t + 1) / 2). Other derivatives are in `losses/f_divergences.py`: forward KL
  gives the original DPG, reverse KL gives reinforcement with a KL penalty.

  Differences: Z is the mean over the group instead of all earlier samples, and b a moving average
  instead of the mean of the last 1024. Rows are sampled on-policy. The default of beta is ours.

  Args:
    beta: temperature of the target, in units of the reward.
    decay: decay of the moving average b, per batch.

  Confidence: CODE.
  """
  return Method(
    credit=part(
      credit.divergence_reward,
      derivative=part(f_divergences.jensen_shannon),
      beta=beta,
      decay=decay,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    anchors={'reference': part(optim.fixed)},
  )
