from functools import partial

from polgrad import collect, learner, objectives, optim
from polgrad.losses import aggregation, logit_stats
from polgrad.methods.base import Method
from polgrad.registry import Fraction, Positive, part, weighted


def elr_plus(
  *,
  steps: int,
  supervised_rate: float,
  coefficient: float = 3.0,
  decay: float = 0.7,
  mixing: Positive = 1.0,
  mean_decay: Fraction = 0.997,
  ramp: Fraction = 0.5,
  top: int = 16,
) -> Method:
  """ELR+ (arXiv:2007.00151): two networks that give each other targets, on rows that are mixed.

      loss = mean over positions of -l log pi(y_i) - (1 - l) log pi(y_j) + coefficient log(1 - <t, pi>)
      t = l t_i + (1 - l) t_j,   t_i <- decay t_i + (1 - decay) p_i

  pi reads the mixture l E(x_i) + (1 - l) E(x_j) of the embeddings of row i and of a random row j of the
  batch; l = max(u, 1 - u), u ~ Beta(mixing, mixing). p_i is what the running mean of the other network
  predicts on row i itself: of the anchor `peer_mean` for the policy, and of `policy_mean` for the anchor
  `peer`, which learns by the same loss with a mixture of its choice. The decay of these means is
  mean_decay exp(-5 (1 - step / (ramp steps))^2), until it is `mean_decay`. So neither network follows
  its own errors. `elr` has one network and no mixture.

  Differences: The paper classifies images. Rows are mixed position by position, and a position of one
  row alone counts with its weight. Both networks begin as the same model, on the same rows in the same
  order, and differ by what they mix. For each token only the `top` largest entries of t are kept;
  1 - <t, pi> is at least 1e-4, while the code bounds each probability by 1e-4. On CIFAR-100 the code
  also weighs labels by t, and lets the coefficient rise. Its predictions are the mean of both networks;
  evaluations measure the policy, and the peer with `--config.evaluation.anchors="('peer',)"`.

  Args:
    steps: batches of the run; the run fills it in.
    supervised_rate: learning rate of the peer; the run fills it in.
    coefficient: lambda; 3 for CIFAR-10 and 7 for CIFAR-100.
    decay: beta; 0.7 for CIFAR-10 and 0.9 for CIFAR-100.
    mixing: both parameters of the Beta distribution.
    mean_decay: decay of the running means of parameters.
    ramp: fraction of the run after which that decay is reached; 40,000 of 78,000 updates in the paper.
    top: entries of t that are kept.

  Confidence: CODE (formula and constants), DERIVED (for language models).
  """
  objective = part(
    objectives.Supervised,
    loss=part(logit_stats.mixed_nll),
    aggregation=part(aggregation.token_mean),
    penalties={'early_learning': weighted(coefficient, part(logit_stats.early_learning_of_rows))},
  )
  mean = dict(decay=mean_decay, ramp=max(round(ramp * steps), 1))
  return Method(
    collect=partial(collect.MixedTargets, decay=decay, mixing=mixing, top=top),
    objective=objective,
    anchors={
      'peer': part(optim.fixed),
      'peer_mean': part(optim.slow_ema_of_peer, **mean),
      'policy_mean': part(optim.slow_ema, **mean),
    },
    learned={
      'peer': part(
        learner.Learned,
        objective=objective,
        optimizer=part(optim.adamw, learning_rate=supervised_rate),
      )
    },
    warm_start=False,
  )
