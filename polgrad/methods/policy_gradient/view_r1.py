from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, multipliers, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def view_r1(
  *, kl_coefficient: float = 0.001, rate: float = 2.71828, base: float = 1.00001, least: float = 1.0
) -> Method:
  """APO of View-R1 (arXiv:2506.21655): a KL that spares hard prompts, and a push against long mistakes.

      A_i = m_i (R_i - mean_g) / (std_g + 1e-9)
      m_i = 2 - base^-(L_i - mean length of the right answers) for longer wrong answers, else 1
      loss = mean over sequences of token means of -min(r A, clip(r, 0.8, 1.2) A) + kl_coefficient k k3
      k = 1 - exp(-rate p_g) where A > 0 and 0 < p_g < 1, else 1

  p_g is the share of right answers to the prompt. Good answers to hard prompts may leave the reference,
  so that the policy keeps what it knows and still learns what is new. With k = m = 1 this is GRPO.

  Args:
    kl_coefficient: of the KL to the reference.
    rate: how fast its weight grows with p_g; the authors' is Euler's number.
    base: of the factor of long mistakes; 1 turns it off.
    least: least reward of a right answer.

  Confidence: CODE (weights), MEMORY (aggregation).
  """
  pushed = part(
    credit.scaled,
    credit=part(credit.outcome, advantage=part(advantages.group_normalized, eps=1e-9)),
    multiplier=part(multipliers.long_and_wrong, least=least, base=base),
  )
  return Method(
    credit=part(credit.with_success_rate, credit=pushed, least=least),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped),
      aggregation=part(aggregation.sequence_mean),
      penalties={'kl': weighted(kl_coefficient, part(penalties.easy_k3, rate=rate))},
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
