from polgrad import credit, metric_history, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def epo(
  *,
  steps: int,
  entropy_coefficient: float = 0.001,
  band_coefficient: float = 0.001,
  low: float = 0.8,
  high: float = 1.2,
) -> Method:
  """EPO (arXiv:2509.22576): an entropy bonus, and a band around the entropy of earlier updates.

      loss = token mean of -min(r A, clip(r, 0.8, 1.2) A) - entropy_coefficient H
             + band_coefficient w [relu(low H' - H) + relu(H - high H')]
      w = 1 - 0.2 (1 - exp(-2 p)) in the first half of the run, 0.8 exp(-3 p) in the second

  r = pi / pi_old, and A is the group-normalised reward. H is the entropy of the next token, H' its
  mean over all earlier updates, and p the fraction of the half that is done, so w falls from 1 to 0.83
  and from 0.8 to 0.04.

  Differences: The band of the released code is a step function, whose gradient is 0
  (`penalties.entropy_band_published`); the slope outside the band is ours. Tokens take the place of
  turns, and there is no condition on the number of turns.

  Args:
    steps: number of rollouts; the run fills it in.
    entropy_coefficient: of the entropy bonus, in nats.
    band_coefficient: of the penalty outside the band.
    low: lower edge of the band, in units of H'.
    high: upper edge of the band, in units of H'.

  Confidence: CODE (weights, bounds), DERIVED (band).
  """
  minibatches = 2
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.token_mean),
      penalties={
        'bonus': weighted(entropy_coefficient, part(penalties.negative_entropy)),
        'band': weighted(band_coefficient, part(penalties.entropy_band, low=low, high=high)),
      },
      schedules={'band': part(optim.two_phase, steps=minibatches * steps)},
      history={'mean_entropy': part(metric_history.running_mean, metric='entropy')},
    ),
    minibatches=minibatches,
  )
