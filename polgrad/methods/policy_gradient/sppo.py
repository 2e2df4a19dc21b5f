from polgrad import credit, objectives, optim
from polgrad.losses import implicit_rewards, pointwise
from polgrad.methods.base import Method
from polgrad.registry import part


def sppo() -> Method:
  """SPPO (arXiv:2405.00675): self-play that regresses log-ratios on win rates.

  loss = mean over rows of (log(pi / reference) - eta (P - 1/2))^2, P the chance to beat another
  answer of the group, by the mean sigmoid of the rewards' gap; the reference is the policy that
  sampled, taken anew for every batch of four updates. To first order that is multiplicative weights.
  eta = 10 here and 1000 in the paper (beta = 0.001), with rounds of many batches and a learned judge.
  Confidence: CODE (formula and the paper's eta).
  """
  return Method(
    credit=part(credit.win_rate),
    objective=part(
      objectives.Pointwise,
      score=part(implicit_rewards.log_ratio_sum),
      loss=part(pointwise.squared, target=5.0),  # eta / 2: the target of P = 1
    ),
    anchors={'reference': part(optim.sync, every=4)},
    minibatches=4,
  )
