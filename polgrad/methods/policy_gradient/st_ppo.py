from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, ratios, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def st_ppo(*, learning_rate: float, eps: float = 0.2, max_scale: float = 10.0) -> Method:
  """ST-PPO (arXiv:2511.20718): one ratio per turn, and steps that shrink with the bias of clipping.

      loss = -mean over sequences of token means of min(r A, clip(r, 1 - eps, 1 + eps) A)
      step = (step of AdamW) / clip(||C||, 1, max_scale)

  r = exp(mean of log(pi / pi_old) over the tokens of the turn). C is the part of the gradient that
  clipping removes. If an answer is a single turn, r is the ratio of GSPO. The paper averages
  advantages over a turn; one advantage per row is already constant over it.

  Differences: The step of AdamW is divided, not the gradient, because Adam's step does not depend
  on the scale of the gradient. ||C|| is clipped to [1, max_scale]. A is the group-normalised reward
  instead of the estimate of a critic. There is no KL.

  Args:
    learning_rate: of AdamW; the run fills it in.
    eps: distance of the clipping bounds from 1.
    max_scale: largest number that a step is divided by, at least 1.

  Confidence: PAPER (ratio, C), MEMORY (constants).
  """
  bounds = {'eps_low': eps, 'eps_high': eps}
  adamw = part(optim.adamw, learning_rate=learning_rate)
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, **bounds),
      ratio=part(ratios.turn_geometric),
      aggregation=part(aggregation.sequence_mean),
      probes={'clipping_bias': part(surrogates.clipped_away, **bounds)},
    ),
    optimizer=part(optim.bias_scaled, optimizer=adamw, max_scale=max_scale),
    minibatches=4,
  )
