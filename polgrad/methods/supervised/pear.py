from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, weights
from polgrad.methods.base import Method
from polgrad.registry import part
from polgrad.sampling import behavior_policies


def pear(*, block: int = 1, decay: float = 0.999) -> Method:
  """PEAR (arXiv:2602.01058): a teacher's right answers, weighted by how the policy would finish them.

      loss = -token mean of sg(w) log pi,   w = clip(decay^(n - e) prod_{j > e} rho_j, 0.1, 10)

  rho = pi / teacher of a token, its logarithm clipped to [-0.08, 0.3], n is the number of tokens of the
  answer, and e the last token of the block of `block` tokens that the token is in. Only answers of
  reward above 1/2 are used. On these, without bounds and decay, the expected weight of a token is in
  proportion to the probability that the policy itself succeeds after it. So tokens weigh most from which
  the policy can finish, which prepares it for reinforcement. Blocks as long as the answers give plain
  supervised learning. `pear_sequence` weighs whole answers.

  Differences: The answers are sampled from the teacher in the run, while the paper has a data set and
  the stored log-probs of the policy that wrote it.

  Args:
    block: number of tokens that share a weight; 1 is the paper's variant of tokens.
    decay: factor for each token that follows the block.

  Confidence: CODE (weights and bounds, not the authors'), PAPER.
  """
  return Method(
    collect=partial(
      collect.Rollouts, samples_per_prompt=1, behavior_policy=part(behavior_policies.teacher)
    ),
    objective=part(
      objectives.Supervised,
      aggregation=part(aggregation.token_mean),
      weights={'suffix': part(weights.suffix_importance, block=block, decay=decay)},
      only='rewards',
    ),
    anchors={'teacher': part(optim.fixed)},
    restart=True,
    learns='imitate',
  )
