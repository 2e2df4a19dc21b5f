from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def pcl(*, beta: float = 0.3, window: int = 3, replay_fraction: float = 0.5) -> Method:
  """PCL (arXiv:1702.08892): a policy and a value that agree on every sub-path of an answer.

      loss = token mean of C_t^2 / 2
      C_t = -V_t + V_{t+d} + R 1[the path ends] - beta sum_{t <= k < t+d} log(pi_k / reference_k)

  over the next d = `window` tokens, or fewer at the end. The gradient flows to policy and value. At
  the optimum pi = reference exp(R / beta) / Z, whichever policy sampled, so a fraction of the
  groups of a batch is drawn from the last four batches.

  Differences: The paper has the uniform reference (an entropy bonus), longer sub-paths and a
  separate learning rate for the value. Here policy and value share a network, and the policy's
  gradient is beta times that of the value. The learning rate is 3 times that of the run.

  Args:
    beta: coefficient of the KL to the reference, in units of the reward per nat.
    window: largest number of tokens of a sub-path.
    replay_fraction: fraction of the groups that are replayed.

  Confidence: MEMORY (constants), DERIVED (formula).
  """
  return Method(
    collect=partial(collect.Rollouts, replay=4, replay_fraction=replay_fraction),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.path_consistency, beta=beta, window=window),
      aggregation=part(aggregation.token_mean),
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
    learning_rate=3.0,
  )
