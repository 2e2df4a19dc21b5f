from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, pair_selections, pair_weights, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def sera(
  *,
  beta: float = 0.1,
  fraction: float = 0.7,
  ensemble: float = 0.5,
  iterations: int = 3,
  steps: int = 300,
) -> Method:
  """SeRA (arXiv:2410.09362): DPO on the pairs whose implicit reward margin is among the largest.

      loss = mean over the kept pairs of softplus(-beta h)
      kept: the `fraction` of a batch with the largest ensemble h(policy) + (1 - ensemble) h(previous)

  h is the margin of `dpo`: a pair with a wrong label tends to have a small one. `previous` is the policy
  at the end of the last iteration. In the first iteration all pairs are kept.

  Differences: The paper selects once an iteration from the whole data set, by the policies of the last
  two iterations; here pairs are selected from each batch, by the present policy and `previous`. The
  paper also makes pairs of the policy's own samples; here all pairs are from the data.

  Args:
    beta: coefficient of the KL to the reference.
    fraction: of the pairs of a batch that are kept.
    ensemble: weight of the policy's own margin.
    iterations: number of equal parts of the run, at whose ends `previous` is taken.
    steps: updates of the run; the run fills it in.

  Confidence: PAPER (idea, from the abstract), MEMORY (constants).
  """
  every = max(steps // iterations, 1)
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=beta,
      weights={'kept': part(pair_weights.kept_pairs)},
      selections={
        'pair_factors': part(
          pair_selections.largest_gaps, fraction=fraction, ensemble=ensemble, begin=every
        ),
      },
    ),
    anchors={
      'reference': part(optim.fixed),
      'previous': part(optim.sync, every=every),
    },
  )
