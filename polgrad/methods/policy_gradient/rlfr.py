from polgrad import credit, learner, objectives, optim
from polgrad.losses import advantages, aggregation, auxiliary_rewards, surrogates
from polgrad.methods.base import Method
from polgrad.objectives import networks
from polgrad.registry import part


def rlfr(
  *,
  eps: float = 0.2,
  coefficient: float = -0.01,
  threshold: float = 0.6,
  keep: int = 15,
  time: float = 0.8,
  states_of: str = 'policy',
  flow_rate: float = 1e-4,
) -> Method:
  """RLFR (arXiv:2510.10201): token rewards of a flow that models hidden states of right answers.

      loss = mean over sequences of token means of -min(r A, clip(r, 1 - eps, 1 + eps) A)
      A_t  = (R - mean_g) / (std_g + 1e-9) + coefficient sum over s >= t of n_s

  r = pi / pi_old, and std_g is unbiased. The network `flow` learns by flow matching the states of the
  tokens of right rows (R >= 1) in three layers, each given the state of the token before, see
  `networks.Flow`. The score of a token is how far the flow at time .8 is from its state. n is the score
  as a fraction of the range of its row, kept where it is above `threshold` and one of the `keep` largest
  of the row, else 0. With coefficient 0 or threshold 1 this is GRPO without a KL.

  Differences: The flow begins at random; the release trains it on a corpus of right answers first.
  During reinforcement learning the release trains the flow at the time of the score; here its times are
  always those of flow matching, and it makes one step a batch, before those of the policy. The least
  score of a row is that of its tokens, see `auxiliary_rewards.flow_rewards`.

  Args:
    eps: distance of the clipping bounds from 1.
    coefficient: reward of a token with n = 1.
    threshold: least n that is rewarded.
    keep: tokens of a row that are rewarded, at most.
    time: of the flow, at which states are scored; 1 is the state without noise.
    states_of: whose states the flow reads, the policy's or those of an anchor.
    flow_rate: learning rate of the flow.

  Confidence: CODE (formulas of the rewards and of the flow; the flow's blocks are of the same kind).
  """
  flow = part(
    learner.OnlineNetwork,
    network=part(networks.Flow, time=time),
    optimizer=part(optim.adamw, learning_rate=flow_rate),
    states_of=states_of,
  )
  return Method(
    credit=part(
      credit.token_rewarded,
      credit=part(credit.outcome, advantage=part(advantages.group_normalized, ddof=1, eps=1e-9)),
      rewards=part(
        auxiliary_rewards.flow_rewards, threshold=threshold, keep=keep, coefficient=coefficient
      ),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.sequence_mean),
    ),
    networks={'flow': flow},
    anchors={} if states_of == 'policy' else {states_of: part(optim.fixed)},
  )
