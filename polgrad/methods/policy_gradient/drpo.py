from polgrad import objectives
from polgrad.losses import aggregation, implicit_rewards, listwise, selections, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def drpo(
  *,
  max_new_tokens: int,
  samples_per_prompt: int,
  negative_temperature: float = 10.0,
  spread: float = 0.1,
  least: float = 1.0,
  coefficient: float = 1e3,
  limit: float = 1e-4,
) -> Method:
  """DRPO (arXiv:2510.04474): length is rewarded among right answers alone.

      loss = mean over prompts of T log mean_j exp(s_j / T)
             - sum_i w_i s_i / sum_i w_i,   plus c KL(pi_old || pi)
      w_i = exp((1 - L_i / max_new_tokens) / spread),   c = max(coefficient (KL - limit), 0)

  s is the mean log-probability of the tokens of an answer, i are the right and j the wrong answers to a
  prompt, and L is a length. A long right answer is learned less than a short one, but never unlearned,
  as it is where a length penalty is part of a normalised reward. KL is the mean of log pi_old - log pi
  over the tokens of the batch, and c is a constant of the gradient.

  Prompts without right or without wrong answers have loss 0 and are counted by the mean.

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    samples_per_prompt: answers to a prompt, which stay together in minibatches; the run fills it in.
    negative_temperature: T, nats; a large one weighs all wrong answers alike.
    spread: a large one weighs all right answers alike.
    least: least reward of a right answer.
    coefficient: slope of the penalty beyond `limit`.
    limit: KL that is not penalised, nats.

  Confidence: CODE.
  """
  answers = part(
    objectives.Listwise,
    score=part(implicit_rewards.logp_mean),
    loss=part(
      listwise.decoupled,
      least=least,
      temperature=negative_temperature,
      spread=spread,
      longest=max_new_tokens,
    ),
    rows_per_prompt=samples_per_prompt,
  )
  excess = part(selections.excess_drift, coefficient=coefficient, limit=limit)
  region = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.drift),
    aggregation=part(aggregation.token_mean),
    selections={'excess_drift': excess},
  )
  return Method(
    objective=part(
      objectives.WeightedSum,
      streams={'answers': weighted(1.0, answers), 'region': weighted(1.0, region)},
    ),
    minibatches=4,
  )
