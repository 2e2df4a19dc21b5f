from functools import partial

from polgrad import collect, metric_history, objectives, optim
from polgrad.losses import implicit_rewards, pair_selections, pair_weights, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def beta_dpo(
  *,
  beta: float = 0.1,
  rate: float = 0.6,
  dropped: float = 0.2,
  decay: float = 0.9,
  least: float = 1e-3,
  correct_bias: bool = False,
) -> Method:
  """beta-DPO (arXiv:2407.08639): DPO with a beta of each batch, and without outlying pairs.

      loss = mean over the drawn pairs of softplus(-beta_b h)
      beta_b = max(least, beta (1 + rate (mean h of the drawn pairs - M)))

  h is the margin of `dpo`, M and S are moving averages of its mean and standard deviation over the
  batches, this one included. Of a batch a fraction 1 - dropped of the pairs is drawn, without
  replacement, with probabilities proportional to exp(-((h - M) / S)^2 / 2). Averages, draw and beta_b
  are those of the whole batch and carry no gradient. rate = dropped = 0 is DPO.

  Args:
    beta: at a batch whose margins are the average.
    rate: alpha of the paper; 0 keeps beta.
    dropped: rho of the paper, the fraction of pairs that are left out.
    decay: of the moving averages.
    least: smallest beta of a batch.
    correct_bias: correct the averages for their start at 0, which in the authors' code makes the first
      batches keep pairs whose margin is near 0.

  Confidence: CODE.
  """
  draw = dict(dropped=dropped, decay=decay, correct_bias=correct_bias)
  adaptive = part(pair_selections.adaptive_beta, beta=beta, rate=rate, least=least, **draw)
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      scales={'beta': part(pair_weights.batch_beta)},
      weights={'drawn': part(pair_weights.kept_pairs)},
      selections={
        'pair_factors': part(pair_selections.near_average, **draw),
        'batch_beta': adaptive,
      },
      history={
        'gap_average': part(metric_history.average, metrics=('margin', 'margin_std'), decay=decay),
      },
    ),
    anchors={'reference': part(optim.fixed)},
  )
