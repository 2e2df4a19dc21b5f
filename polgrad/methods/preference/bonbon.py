from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, best_of_n, implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def bonbon(*, samples: int = 8, nll_coefficient: float = 0.005) -> Method:
  """BonBon (arXiv:2406.00832): learns the distribution of the best of n samples from best and worst.

      loss = -a (mean over pairs of log pi(best)) + (1 - a) (mean over pairs of (h - t)^2)
      h = log(pi / reference)(best) - log(pi / reference)(worst)
      t = (n - 1) (1 + 1/2 + ... + 1/(n - 1))

  t is the margin that the distribution of the best of n samples has on average, so there is no
  temperature to choose; a is `nll_coefficient`. The data are pairs: the best (`chosen`) and the worst
  (`rejected`) of `samples` completions of the reference.

  Differences: The pairs are given; the paper samples them first.

  Args:
    samples: n, completions of a prompt among which the two are the best and the worst.
    nll_coefficient: a, of the negative log-likelihood of the best one.

  Confidence: PAPER (through another implementation's notes), MEMORY (the constant 0.005).
  """
  target = best_of_n.mean_margin(samples)
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.WeightedSum,
      streams={
        'preference': weighted(
          1 - nll_coefficient,
          part(
            objectives.Pairwise,
            score=part(implicit_rewards.log_ratio_sum),
            link=part(preference_losses.squared, target=target),
          ),
        ),
        'likelihood': weighted(
          nll_coefficient,
          part(
            objectives.Supervised,
            aggregation=part(aggregation.sequence_sum),
            preferred_only=True,
          ),
        ),
      },
    ),
    anchors={'reference': part(optim.fixed)},
  )
