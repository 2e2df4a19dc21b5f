from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def turn_grpo(*, eps: float = 0.2, discount: float = 0.9) -> Method:
  """Turn-discounted GRPO (arXiv:2505.24298): each turn has the return that follows it.

      loss = token mean of -min(r A, clip(r, 1 - eps, 1 + eps) A)
      A_k = (R_k - mean_g) / (std_g + 1e-6),   R_k = r_k + discount R_{k+1}

  r = pi / pi_old; mean and unbiased deviation are those of all turns of the samples of the prompt, so
  a turn is also compared with turns of other numbers. `turn_rloo` compares it with those of its number.

  Differences: In the source, which is a training system, the discount is a choice of the server and
  off by default; the turns of a group are normalised as if each were a row.

  Args:
    eps: distance of the clipping bounds from 1.
    discount: of rewards, per turn; 1 gives all turns of an outcome the same return.

  Confidence: CODE (returns, as in AReaL), DERIVED (normalisation).
  """
  return Method(
    credit=part(
      credit.turn_returns,
      advantage=part(advantages.group_normalized, ddof=1, eps=1e-6),
      discount=discount,
      among='group',
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
  )
