from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation, logit_stats
from polgrad.methods.base import Method
from polgrad.registry import part


def otr() -> Method:
  """OTR (arXiv:2509.26313): supervised learning as REINFORCE on one token drawn at each position.

  loss = token mean of -sum_a q_a R_a log pi_a, q = softmax(logits / 1.3) as data, R = 1 for the
  token of the data and -0.1 for every other. The paper draws 256 tokens from q; this is the
  expectation over them. A token is learned in proportion to its probability, so what is far from the
  policy is hardly imitated. The warm start stands for the pretrained model that the paper goes on
  from.

  Confidence: PAPER (reward), MEMORY (constants), DERIVED (expectation).
  """
  return Method(
    learns='reinforce',
    collect=partial(collect.Demonstrations),
    objective=part(
      objectives.Supervised,
      aggregation=part(aggregation.token_mean),
      loss=part(logit_stats.one_token_rollout, beta=-0.1, temperature=1.3),
    ),
  )
