from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation, logit_stats
from polgrad.methods.base import Method
from polgrad.registry import Positive, part


def otr(*, beta: float = -0.1, sampling_temperature: Positive = 1.3) -> Method:
  """OTR (arXiv:2509.26313): supervised learning as REINFORCE on one token drawn at each position.

      loss = mean over rows of the token mean of -sum_a q_a R_a log pi_a
      q = softmax(logits / sampling_temperature)

  R_a is 1 for the token of the data and `beta` for every other token. No gradient flows through q.
  A token is learned in proportion to its probability, so tokens that are unlikely under the policy
  are hardly imitated.

  Differences: The paper draws 256 tokens from q; this is the expectation over them.

  Args:
    beta: reward of a token that is not the one of the data.
    sampling_temperature: of the distribution q.

  Confidence: PAPER (reward), MEMORY (constants), DERIVED (expectation).
  """
  return Method(
    learns='reinforce',
    collect=partial(collect.Demonstrations),
    objective=part(
      objectives.Supervised,
      aggregation=part(aggregation.sequence_mean),
      loss=part(logit_stats.one_token_rollout, beta=beta, temperature=sampling_temperature),
    ),
  )
