from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, multipliers, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def adora(*, max_new_tokens: int, otherwise: float = 0.1, least: float = 1.0) -> Method:
  """ADORA (arXiv:2602.10019): prompts whose long answers are right are learned more than others.

      A_i = w_g (R_i - mean_g) / (std_g + 1e-6)
      w_g = 1 if the longest right answer is longer than the wrong ones on average, else `otherwise`
      loss = -token mean of min(r A, clip(r, 0.8, 1.2) A)

  Wrong answers that were cut at `max_new_tokens` are not compared. A group without right answers has w =
  `otherwise`, and one without a wrong answer to compare has w = 1. Both have A = 0 in any case if all
  their rewards are equal.

  Differences: The paper only says that prompts are divided into useful and other ones; the rule is that
  of the authors' release for language models. Their release for images treats empty sets the other
  way: `no_right` 1 and `no_wrong` 0.1. They cut at 4054 of 4096 tokens.

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    otherwise: weight of the other prompts; 1 is group normalisation.
    least: least reward of a right answer.

  Confidence: CODE (weights), MEMORY (loss and bounds).
  """
  return Method(
    credit=part(
      credit.scaled,
      credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
      multiplier=part(
        multipliers.longer_when_right,
        otherwise=otherwise,
        no_right=otherwise,
        least=least,
        cut=max_new_tokens,
      ),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
  )
