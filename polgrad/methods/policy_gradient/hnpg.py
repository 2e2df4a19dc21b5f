from functools import partial

from polgrad import collect, credit, objectives
from polgrad.collect import beginnings
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def hnpg(
  *,
  resets: float = 0.5,
  eps: float = 0.2,
  trace: float = 0.97,
  value_coefficient: float = 0.5,
  offline_weight: float = 1.0,
) -> Method:
  """HNPG (arXiv:2311.08384): policy gradient on its own states and on those of given answers.

      loss = L_own + L_data
      L = token mean of -min(r A, clip(r, 1 - eps, 1 + eps) A) + coefficient token mean of (V - G)^2 / 2

  L_own is that of answers from the prompt, with G the sum of rewards from the token on. L_data is that
  of what the policy does in states of the data: a uniformly drawn beginning of the record's answer,
  given with probability `resets`. There G is one step of the Bellman equation of the present policy: the
  reward plus the value of the next state. The coefficient is `value_coefficient`, and in L_data it is
  multiplied by `offline_weight`. A is GAE with lambda = `trace` for both kinds, whitened over the batch,
  and r = pi / pi_old.

  Differences: The authors' critic is of states and actions, and its offline errors are those of the
  actions in the data. Here it is of states, so the offline errors are those of what the policy itself
  does behind a beginning of the answer. Their policy step is that of TRPO, with a KL of at most 0.01;
  here the ratio is clipped. The exact update of a table is `polgrad.tabular.hybrid`.

  Args:
    resets: probability to begin with a part of the given answer; above 0 and below 1, so that there are
      rows of both kinds.
    eps: distance of the clipping bounds from 1.
    trace: lambda of the advantages.
    value_coefficient: of the errors of the critic.
    offline_weight: weight of the errors in states of the data, lambda in the paper.

  Raises:
    ValueError: `resets` is not above 0 and below 1.

  Confidence: CODE (losses), and ours where it says so under Differences.
  """
  if not 0 < resets < 1:
    raise ValueError(
      f'hnpg: resets must be above 0 and below 1, so that there are rows of both kinds, got {resets}'
    )

  def one(coefficient: float):
    return part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
      penalties={'value': weighted(coefficient, part(penalties.value_error))},
    )

  return Method(
    collect=partial(collect.Restarts, beginning=part(beginnings.uniform, probability=resets)),
    credit=part(credit.hybrid, trace=trace, normalizer=part(advantages.whiten)),
    objective=part(
      objectives.WeightedSum,
      streams={
        'demonstration': weighted(1.0, one(value_coefficient * offline_weight)),
        'sampled': weighted(1.0, one(value_coefficient)),
      },
    ),
    minibatches=2,
  )
