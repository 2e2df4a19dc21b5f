from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import (
  implicit_rewards,
  listwise,
  pair_selections,
  pair_weights,
  preference_losses,
)
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, part
from polgrad.sampling import behavior_policies


def sera(
  *,
  beta: float = 0.1,
  fraction: float = 0.7,
  ensemble: float = 0.5,
  bootstrap: bool = False,
  iterations: AtLeastOne = 3,
  samples_per_prompt: int = 4,
  steps: int = 300,
) -> Method:
  """SeRA (arXiv:2410.09362): DPO on the pairs whose implicit reward margin is among the largest.

      loss = mean over the kept pairs of softplus(-beta h)
      kept: the `fraction` of a batch with the largest ensemble h(policy) + (1 - ensemble) h(previous)

  h is the margin of `dpo`: a pair with a wrong label tends to have a small one. `previous` is the policy
  at the end of the last iteration. In the first iteration all pairs are kept.

  With bootstrap=True, `previous` also writes samples for each prompt. Of these and the given ones, the
  completion with the largest log(previous / reference) is preferred to that with the smallest, and this
  pair competes with the given one (`credit.bootstrapped_pairs`). The loss is then the mean over prompts
  of the sum over their kept pairs; a prompt without one does not count. No reward is read.

  Differences: The paper selects once an iteration from the whole data set, by the policies of the last
  two iterations; here pairs are selected from each batch, by the present policy and `previous`. Samples
  are drawn when they are used, not once an iteration.

  Args:
    beta: coefficient of the KL to the reference.
    fraction: of the pairs of a batch that are kept.
    ensemble: weight of the policy's own margin.
    bootstrap: whether `previous` makes further pairs.
    iterations: number of equal parts of the run, at whose ends `previous` is taken.
    samples_per_prompt: samples of `previous`, if it makes pairs.
    steps: updates of the run; the run fills it in.

  Confidence: PAPER (idea, from the abstract), MEMORY (constants).
  """
  every = max(steps // iterations, 1)
  score = part(implicit_rewards.log_ratio_sum)
  anchors = {'reference': part(optim.fixed), 'previous': part(optim.sync, every=every)}
  if bootstrap:
    return Method(
      collect=partial(
        collect.Rollouts,
        samples_per_prompt=samples_per_prompt,
        preferences=1,
        behavior_policy=part(behavior_policies.previous),
        recompute_proximal=True,
      ),
      credit=part(credit.bootstrapped_pairs, fraction=fraction, ensemble=ensemble),
      objective=part(
        objectives.Listwise,
        score=score,
        loss=part(listwise.two_pairs),
        beta=beta,
        rows_per_prompt=samples_per_prompt + 2,
      ),
      anchors=anchors,
      learns='preference',
    )
  kept = part(pair_selections.largest_gaps, fraction=fraction, ensemble=ensemble, begin=every)
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=score,
      link=part(preference_losses.logistic),
      beta=beta,
      weights={'kept': part(pair_weights.kept_pairs)},
      selections={'pair_factors': kept},
    ),
    anchors=anchors,
  )
