from polgrad import credit, objectives, optim
from polgrad.losses import aggregation, f_divergences, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def f_dpg() -> Method:
  """f-DPG (arXiv:2302.08215): the policy gradient of an f-divergence to a target distribution.

  Target p = reference exp(R / beta) / Z of whole rows; loss = mean over rows of -A log pi(y), A =
  -f'(pi / p) - b, here the Jensen-Shannon divergence, f'(t) = (log t - log((t + 1) / 2)) / 2. Other
  derivatives stand in `losses/f_divergences.py`: forward KL is the original DPG, reverse KL is
  reinforcement with a KL penalty. Ours: Z is the mean over the group for one over all earlier
  samples, b a moving average for a window of 1024, beta = 0.3, and on-policy samples.

  Confidence: CODE.
  """
  return Method(
    credit=part(
      credit.divergence_reward, derivative=part(f_divergences.jensen_shannon), beta=0.3, decay=0.9
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    anchors={'reference': part(optim.fixed)},
  )
