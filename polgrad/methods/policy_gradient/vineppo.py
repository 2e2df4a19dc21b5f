from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.collect import splits
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def vineppo(
  *, value_samples: int = 9, most_steps: int = 8, eps: float = 0.2, kl_coefficient: float = 1e-4
) -> Method:
  """VinePPO (arXiv:2410.01679): PPO whose values are means over further completions.

      loss = -token mean of min(r A, clip(r, 1 - eps, 1 + eps) A) + kl_coefficient min(k3, 10)
      A = r_j + V(s_{j+1}) - V(s_j) at the tokens of step j, whitened over the batch

  r = pi / pi_old in the loss; r_j is the reward of step j, which only the last step has. V(s_j) is the
  mean reward of `value_samples` completions that the policy draws from the state before step j. There
  is no critic. A step is a line of the completion; a task whose answers are one line has one step, and
  A is then R - V(prompt). A batch is used for two epochs.

  Differences: The temperature (.6 in the paper) and top-p (.9) are those of the task. Rows with equal
  prefixes share an estimate, so V(prompt) is estimated once for all samples of a prompt. At most
  `most_steps` steps of a completion have a value. An epoch has 2 updates instead of 8.

  Args:
    value_samples: completions that a value is the mean of; its variance is p (1 - p) / value_samples
      for a state that is solved with probability p.
    most_steps: largest number of steps of a completion; of more, some are joined.
    eps: distance of the clipping bounds from 1.
    kl_coefficient: of the KL to the reference.

  Confidence: CODE.
  """
  return Method(
    collect=partial(
      collect.Vines, split=part(splits.lines), value_samples=value_samples, most_steps=most_steps
    ),
    credit=part(credit.step_values, normalizer=part(advantages.whiten)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
      penalties={'kl': weighted(kl_coefficient, part(penalties.k3, limit=10.0))},
    ),
    anchors={'reference': part(optim.fixed)},
    epochs=2,
    minibatches=2,
  )
