from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def props() -> Method:
  """PROPS (arXiv:2311.08290): who samples moves away from what was sampled already.

  Half of each group is drawn by the policy, the other half by a copy of it that was trained to avoid
  the first, loss = token mean of max(r, clip(r, 0.7, 1.3)), r = copy / policy, until their KL is
  above 0.01. All rows together come closer to the policy's distribution than independent ones, so
  they are used as if they were on-policy: PPO's clipped loss around the policy. Ours: 4 epochs of 4
  minibatches for 16, two rounds a rollout, group-normalised rewards for a critic.

  Confidence: CODE.
  """
  return Method(
    collect=partial(
      collect.Explored,
      rounds=2,
      optimizer=part(optim.adamw, learning_rate=1e-3),
      epochs=4,
      minibatches=4,
      eps=0.3,
      kl_limit=0.01,
    ),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
  )
