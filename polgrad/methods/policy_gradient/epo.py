from polgrad import credit, metric_history, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def epo(*, steps: int) -> Method:
  """EPO (arXiv:2509.22576): an entropy bonus, and a band around the entropy of earlier updates.

  loss = token mean of PPO - 0.001 H + 0.001 w [relu(0.8 H' - H) + relu(H - 1.2 H')], H' the mean
  entropy of all earlier updates, w = 1 - 0.2 (1 - exp(-2 p)) in the first half p of the run, 0.8
  exp(-3 p) in the second. The band of the released code is a step function without gradient
  (`penalties.entropy_band_published`); its slope is ours. Ours too: no condition on the number of
  turns, and tokens for turns.

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
        'bonus': weighted(0.001, part(penalties.negative_entropy)),
        'band': weighted(0.001, part(penalties.entropy_band, low=0.8, high=1.2)),
      },
      schedules={'band': part(optim.two_phase, steps=minibatches * steps)},
      history={'mean_entropy': part(metric_history.running_mean, metric='entropy')},
    ),
    minibatches=minibatches,
  )
