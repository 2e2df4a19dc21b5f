from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def pf_ppo(
  *,
  strategy: str = 'best_worst',
  power: float = 2.0,
  samples_per_prompt: int = 5,
  eps: float = 0.2,
  trace: float = 0.95,
  value_coefficient: float = 0.5,
  entropy_coefficient: float = 0.001,
) -> Method:
  """PF-PPO (arXiv:2409.06957): PPO on the completions of a prompt whose rewards can be relied on.

      loss = -token mean of min(r A, clip(r, 1 - eps, 1 + eps) A)
             + value_coefficient (clipped value error) - entropy_coefficient (entropy)

  A is that of `ppo`. Of the completions of each prompt as many are drawn again, with replacement and
  probabilities by their rewards: a reward model errs least on the best and the worst ones. The paper
  chooses the strategy for which the rewards of the drawn rows explain true scores best (R^2).

  Differences: The authors' code draws rows of a micro-batch from the whole buffer; here every prompt
  keeps its number of rows.

  Args:
    strategy: 'best', 'best_half', 'best_worst' or 'power', see `picks.filter_weights`.
    power: of the strategy 'power'.
    samples_per_prompt: completions of a prompt.
    eps: distance of the clipping bounds from 1, and of those of the value from V_old.
    trace: lambda of GAE.
    value_coefficient: of the value error.
    entropy_coefficient: of the entropy, in nats.

  Confidence: CODE.
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=samples_per_prompt,
      choose=part(collect.picks.filtered, strategy=strategy, power=power),
    ),
    credit=part(credit.generalized, discount=1.0, trace=trace, normalizer=part(advantages.whiten)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
      penalties={
        'value': weighted(value_coefficient, part(penalties.clipped_value_error, eps=eps)),
        'bonus': weighted(entropy_coefficient, part(penalties.negative_entropy)),
      },
    ),
    epochs=2,
    minibatches=2,
  )
