from typing import Literal

from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def gigpo(
  *,
  eps: float = 0.2,
  kl_coefficient: float = 0.01,
  discount: float = 0.95,
  state_weight: float = 1.0,
  per: Literal['trajectory', 'turn'] = 'trajectory',
  void_penalty: float = 0.1,
) -> Method:
  """GiGPO (arXiv:2505.10978): rows of a prompt are compared, and turns that begin in the same state.

      loss = token mean of -min(r A, clip(r, 1 - eps, 1 + eps) A) + kl_coefficient k3
      A = N(R) + state_weight N(R_k),   R_k = r_k + discount R_{k+1}

  N(x) = (x - mean) / (std + 1e-6), in the first term over the samples of the prompt and in the second
  over their turns that read the same before they began. A turn whose state no other turn shares has no
  second term. r = pi / pi_old, k3 = q - 1 - log q with q = reference / pi.

  Differences: A trajectory is one row here, and the released code has a row for each turn. `per='turn'`
  takes the statistics of the first term over turns, as that code does.

  Args:
    eps: distance of the clipping bounds from 1.
    kl_coefficient: of the KL to the reference.
    discount: of rewards, per turn, in the second term.
    state_weight: of the second term; 0 is GRPO with a token mean.
    per: whether a trajectory or a turn counts once in the first term.
    void_penalty: subtracted from R and R_k of a turn in which the policy neither acted nor
      answered (`void_turns`).

  Confidence: CODE (formula as in verl-agent).
  """
  return Method(
    credit=part(
      credit.gigpo,
      advantage=part(advantages.group_normalized, ddof=1, eps=1e-6),
      discount=discount,
      state_weight=state_weight,
      per=per,
      void_penalty=void_penalty,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
      penalties={'kl': weighted(kl_coefficient, part(penalties.k3))},
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
