from polgrad import credit, learner, objectives, optim
from polgrad.losses import advantages, aggregation, implicit_rewards, pointwise, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def prime(
  *,
  learning_rate: float,
  eps: float = 0.2,
  beta: float = 0.05,
  process: float = 1.0,
  reward_model_rate: float = 2.0,
) -> Method:
  """PRIME (arXiv:2502.01456): a reward model of tokens that learns from outcomes, beside the policy.

      loss = -token mean of min(r A, clip(r, 1 - eps, 1 + eps) A)
      reward model: loss = mean over rows of -R log sigmoid(s) - (1 - R) log sigmoid(-s),
             s = beta sum_t q_t,   q_t = log reward_model - log reference

  r = pi / pi_old. The anchor `reward_model` begins as a copy of the policy and learns on every batch
  whether its rows are right; the reference is fixed. q_t is then a reward of token t. A is the sum of
  these from the token on and of the outcome, with leave-one-out baselines and the weights process : 1,
  whitened over the batch.

  Differences: The scores of a batch are those of the reward model before its step on this batch. In the
  release they come from the passes of its update, of which later minibatches see an updated one. Prompts
  are not filtered by their accuracy (.2 to .8 in the paper). That matters where few rows are right: on
  `addition` with the tiny model, 8% right after 120 supervised steps, the reward fell to 0 in 36 steps,
  and rose to .16 in 60 steps with process = 0 (one seed each).

  Args:
    learning_rate: of the policy; the run fills it in.
    eps: distance of the clipping bounds from 1.
    beta: unit of the reward model's logit.
    process: weight of the rewards of tokens beside the outcome.
    reward_model_rate: learning rate of the reward model over that of the policy.

  Confidence: CODE.
  """
  model = part(
    learner.Learned,
    objective=part(
      objectives.Pointwise,
      score=part(implicit_rewards.log_ratio_sum),
      loss=part(pointwise.logistic),
      beta=beta,
    ),
    optimizer=part(
      optim.adamw,
      learning_rate=float(f'{reward_model_rate * learning_rate:.6g}'),
      max_grad_norm=10.0,
    ),
  )
  return Method(
    credit=part(credit.implicit_process, process=process, normalizer=part(advantages.whiten)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
    ),
    anchors={'reference': part(optim.fixed), 'reward_model': part(optim.fixed)},
    learned={'reward_model': model},
  )
