from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, ratios, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def st_ppo(*, learning_rate: float) -> Method:
  """ST-PPO (arXiv:2511.20718): one ratio a turn, and steps that shrink with the bias of clipping.

  loss = mean over sequences of -min(r A, clip(r, 0.8, 1.2) A), r = exp(mean log-ratio of the turn).
  The step is divided by ||C||, C the gradient that clipping takes away. Answers here are one turn,
  where r is GSPO's, and one advantage a row is its own mean over the turn. Ours: Adam's step is
  divided, since Adam would not feel a divided gradient; ||C|| is held in [1, 10]; group-normalised
  rewards for a critic; no KL.

  Confidence: PAPER (ratio, C), MEMORY (constants).
  """
  bounds = {'eps_low': 0.2, 'eps_high': 0.2}
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
    optimizer=part(optim.bias_scaled, optimizer=adamw, max_scale=10.0),
    minibatches=4,
  )
