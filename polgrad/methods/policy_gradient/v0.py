from functools import partial

from polgrad import collect, credit, curricula, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def v0(
  *,
  context: int = 256,
  prompts: float = 0.125,
  least: int = 2,
  largest: int = 32,
  rank: float = 0.25,
  eps_low: float = 0.2,
  eps_high: float = 0.2,
) -> Method:
  """V_0 (arXiv:2602.03584): completions go to prompts whose predicted success rates promise a contrast.

      loss = -token mean of min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)
      A_i = (R_i - mean_g) / (std_g + 1e-6)
      B_x maximise sum_x B_x (1 - p_x) (1 - (1 - p_x)^(B_x - 1)),
          least <= B_x <= largest,   sum B_x fixed

  r = pi / pi_old. A prompt x gets B_x completions, which are one group. p_x is what a model predicts
  from the embedding of x and the newest results of the run on other prompts; the curriculum
  `curricula.v0` has the model, its loss and its differences from the paper, and the kind of
  embeddings (`curriculum.embed`). The advantages are those of GRPO.

  Args:
    context: newest completions that a prediction looks at.
    prompts: different prompts of a step, as a fraction of its completions.
    least: completions of a prompt.
    largest: number of completions of a prompt.
    rank: weight of the ranking in the loss of the model.
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.

  Confidence: PAPER, from a detailed account of it.
  """
  return Method(
    # Groups of one completion, pooled by prompt, so that any number is possible.
    collect=partial(collect.Rollouts, samples_per_prompt=1),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps_low, eps_high=eps_high),
      aggregation=part(aggregation.token_mean),
    ),
    curriculum=part(
      curricula.v0, context=context, prompts=prompts, least=least, most=largest, rank=rank
    ),
    minibatches=2,
  )
