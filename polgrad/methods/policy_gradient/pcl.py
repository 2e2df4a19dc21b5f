from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def pcl() -> Method:
  """PCL (arXiv:1702.08892): a policy and a value that agree on every sub-path of an answer.

  loss = token mean of C_t^2 / 2, C_t = -V_t + V_{t+d} + R 1[the path ends] - beta sum_{t <= k < t+d}
  log(pi_k / reference_k) over the next d = 3 tokens, with gradient to policy and value. At rest pi =
  reference exp(R / beta) / Z, whoever sampled, so half of the groups come from a memory. beta = 0.3:
  the policy's gradient is beta times the value's, with which it shares a network here. The paper has
  the uniform reference (entropy), longer sub-paths and a learning rate of its own for the value.
  Confidence: MEMORY (constants), DERIVED (formula).
  """
  return Method(
    collect=partial(collect.Rollouts, replay=4, replay_fraction=0.5),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.path_consistency, beta=0.3, window=3),
      aggregation=part(aggregation.token_mean),
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
    learning_rate=3.0,
  )
