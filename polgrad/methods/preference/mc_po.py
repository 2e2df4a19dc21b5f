from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, listwise
from polgrad.methods.base import Method
from polgrad.registry import part


def mc_po(
  *,
  candidates: int,
  samples_per_prompt: int,
  beta: float = 0.1,
  negatives: int = 1,
  sampled: bool = False,
) -> Method:
  """MC-PO (arXiv:2502.04567): the best completion against others that the policy finds likely.

      loss = -mean over prompts of log(exp(r_w) / (exp(r_w) + sum over negatives of exp(r_l)))
      r = beta log(pi / reference)(completion)

  w is the completion with the largest reward. The negatives are drawn from the other completions with
  probabilities in proportion to exp(r), under the present policy and without gradient: one step of a
  Monte-Carlo kernel. With one other completion this is DPO. sampled=True is the online form, OnMC-PO.

  Differences: Negatives are drawn without replacement.

  Args:
    candidates: completions of a record in the data; the run fills it in.
    samples_per_prompt: completions of a group that is sampled; the run fills it in.
    beta: coefficient of the KL to the reference.
    negatives: other completions that are drawn.
    sampled: whether the completions are sampled by the policy and judged by the task's verifiers,
      instead of read from the data.

  Confidence: PAPER (loss), MEMORY (details of the draw).
  """
  return Method(
    collect=partial(collect.Rollouts if sampled else collect.Lists),
    objective=part(
      objectives.Listwise,
      score=part(implicit_rewards.log_ratio_sum),
      loss=part(listwise.hard_negatives, negatives=negatives),
      beta=beta,
      rows_per_prompt=samples_per_prompt if sampled else candidates,
    ),
    anchors={'reference': part(optim.fixed)},
  )
