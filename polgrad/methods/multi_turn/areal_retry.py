from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def areal_retry(*, eps: float = 0.2, discount: float = 0.9) -> Method:
  """Discounted retries (arXiv:2505.24298): a problem that is solved later is worth less.

      loss = token mean of -min(r A, clip(r, 1 - eps, 1 + eps) A)
      A = (R - mean_g) / (std_g + 1e-6),   R = sum_k discount^k r_k

  r = pi / pi_old. The environment tells the policy that its answer is wrong and lets it try again; the
  reward is 1 in the turn that is right, so R = discount^(failed attempts). All turns of a row have its
  advantage.

  Differences: The asynchronous training of the source is left out (`decoupled_ppo` has its loss).

  Args:
    eps: distance of the clipping bounds from 1.
    discount: of rewards, per turn before them.

  Confidence: CODE (reward, as in AReaL's multi-turn workflow), DERIVED (the rest is GRPO).
  """
  return Method(
    credit=part(
      credit.discounted_outcome,
      advantage=part(advantages.group_normalized, ddof=1, eps=1e-6),
      discount=discount,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
  )
