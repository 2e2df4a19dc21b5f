from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def props(
  *,
  eps: float = 0.2,
  behavior_eps: float = 0.3,
  kl_limit: float = 0.01,
  behavior_learning_rate: float = 1e-3,
) -> Method:
  """PROPS (arXiv:2311.08290): the policy that samples is trained to avoid what was sampled already.

      behavior policy: loss = token mean of max(r, clip(r, 1 - behavior_eps, 1 + behavior_eps))
      policy: loss = -token mean of min(r' A, clip(r', 1 - eps, 1 + eps) A)

  with r = behavior / policy and r' = pi / pi_old, pi_old the policy before its updates on the
  rollout. The policy draws half of each group. The behavior policy is a copy of it that is trained
  on these rows until its KL to the policy exceeds `kl_limit`; the update that is made then is kept,
  and is the last. The trained copy draws the other half. All rows together match the policy's
  distribution better than independent ones, so they are used as if they were on-policy.

  Differences: The behavior policy gets 4 epochs of 4 minibatches instead of 16 epochs. A group is
  drawn in two rounds. A is the group-normalised reward instead of the estimate of a critic.

  Args:
    eps: distance of the policy's clipping bounds from 1.
    behavior_eps: distance of the behavior policy's clipping bounds from 1.
    kl_limit: KL between behavior policy and policy, in nats per token, that ends the training.
    behavior_learning_rate: of AdamW for the behavior policy.

  Confidence: CODE.
  """
  return Method(
    collect=partial(
      collect.Explored,
      rounds=2,
      optimizer=part(optim.adamw, learning_rate=behavior_learning_rate),
      epochs=4,
      minibatches=4,
      eps=behavior_eps,
      kl_limit=kl_limit,
    ),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
  )
