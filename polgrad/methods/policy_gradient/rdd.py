from polgrad import credit, learner, objectives, optim
from polgrad.losses import advantages, aggregation, reward_maps, surrogates
from polgrad.methods.base import Method
from polgrad.objectives import networks
from polgrad.registry import part


def rdd(
  *,
  eps: float = 0.2,
  coefficient: float = 1.0,
  sigma: float = 1.0,
  states: str = 'last',
  states_of: str = 'policy',
  predictor_rate: float = 3e-4,
) -> Method:
  """RDD (arXiv:2505.11044): a bonus for rare states, the error of a predictor of random targets.

      loss = mean over sequences of token means of -min(r A, clip(r, 1 - eps, 1 + eps) A)
      A    = (R' - mean_g) / (std_g + 1e-6),   R' = R + coefficient sum over visited states h of b(h)
      b(h) = mean over entries of (f(h) - m(h))^2

  r = pi / pi_old, and std_g is unbiased. m is a fixed random network of the model's last hidden state.
  The network `bonus` learns f by the squared error to a target that is drawn from N(m(h), sigma^2) at
  every visit. Where f is the mean of the targets of n visits, b is sigma^2 / n on average, so it counts
  visits. With coefficient 0 this is GRPO without a KL.

  Differences: The paper explores environments; here a state is what a language model has read. The
  bonus compares with m, not with a new target, which would add sigma^2 to all states alike. The states
  of the policy move as it learns, which an anchor as `states_of` avoids.

  Args:
    eps: distance of the clipping bounds from 1.
    coefficient: of the bonus, in units of the reward.
    sigma: standard deviation of the targets; at 0 this is random network distillation.
    states: the visited states of a row: the 'last' one, or 'each', whose bonuses add up, so that longer
      rows get more.
    states_of: whose states are visited, the policy's or those of an anchor.
    predictor_rate: learning rate of f.

  Confidence: PAPER.
  """
  bonus = part(
    learner.OnlineNetwork,
    network=part(networks.RandomTargets, states=states, sigma=sigma),
    optimizer=part(optim.adamw, learning_rate=predictor_rate),
    states_of=states_of,
  )
  return Method(
    credit=part(
      credit.shaped,
      credit=part(credit.outcome, advantage=part(advantages.group_normalized, ddof=1, eps=1e-6)),
      reward=part(reward_maps.with_bonus, coefficient=coefficient),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.sequence_mean),
    ),
    networks={'bonus': bonus},
    anchors={} if states_of == 'policy' else {states_of: part(optim.fixed)},
  )
