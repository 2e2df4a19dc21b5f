from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import implicit_rewards, listwise
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, part


def cream(
  *,
  beta: float = 0.1,
  average: bool = True,
  iterations: AtLeastOne = 3,
  samples_per_prompt: int = 5,
  steps: int = 300,
) -> Method:
  """CREAM (arXiv:2410.12735): self-rewarding DPO, whose labels are as sure as two policies agree.

      loss = mean over prompts of C softplus(-beta h) + (1 - C) softplus(beta h)
      C = (1 + Kendall's tau of the samples' rewards under the policy and under the previous one) / 2

  The implicit reward of a sample is its summed log-ratio to the initial policy. The best and the worst
  sample of a prompt are its pair, and h is the margin of `dpo`. Verifiers are not read. The previous
  policy is the policy at the end of the last iteration.

  Differences: The present policy makes pairs of every batch; the paper makes a data set once an
  iteration. A policy that is still the reference is scored by its mean log-prob, as the paper scores the
  initial one. The average of C is over the prompts of the batch, not of the data set.

  Args:
    beta: coefficient of the KL to the reference.
    average: give all prompts of a batch their mean C, in place of each its own.
    iterations: number of equal parts of the run, at whose ends the previous policy is taken.
    samples_per_prompt: samples that are ranked.
    steps: updates of the run; the run fills it in.

  Confidence: CODE.
  """
  return Method(
    collect=partial(
      collect.Rollouts, samples_per_prompt=samples_per_prompt, recompute_proximal=True
    ),
    credit=part(credit.self_consistency, average=average),
    objective=part(
      objectives.Listwise,
      score=part(implicit_rewards.log_ratio_sum),
      loss=part(listwise.chosen_pair),
      beta=beta,
      rows_per_prompt=samples_per_prompt,
    ),
    anchors={
      'reference': part(optim.fixed),
      'previous': part(optim.sync, every=max(steps // iterations, 1)),
    },
  )
