from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, listwise
from polgrad.methods.base import Method
from polgrad.registry import part


def nca(
  *,
  candidates: int,
  samples_per_prompt: int,
  beta: float = 0.01,
  alpha: float = 0.0,
  sampled: bool = False,
) -> Method:
  """NCA (arXiv:2402.05369): several completions of a prompt, each pulled to a fixed log-ratio.

      loss = -mean over prompts of sum_k (p_k log sigmoid(r_k) + log sigmoid(-r_k) / K)
      r_k = beta log(pi / reference)(completion k),  p = softmax(R / alpha)

  The optimum is r_k = log(K p_k), an absolute value, so the best completion need not get less likely,
  as it may with `infonca`. alpha = 0 is the limit in which p is 1 for the completion with the largest
  reward. Equal rewards: the first one is the best.

  Differences: The authors' runs have alpha = 0.0001, with which p is one-hot: the default alpha = 0.

  Args:
    candidates: completions of a record in the data; the run fills it in.
    samples_per_prompt: completions of a group that is sampled; the run fills it in.
    beta: coefficient of the KL to the reference.
    alpha: temperature of the rewards, in their units.
    sampled: whether the completions are sampled by the policy and judged by the task's verifiers,
      instead of read from the data.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts if sampled else collect.Lists),
    objective=part(
      objectives.Listwise,
      score=part(implicit_rewards.log_ratio_sum),
      loss=part(listwise.nca, alpha=alpha),
      beta=beta,
      rows_per_prompt=samples_per_prompt if sampled else candidates,
    ),
    anchors={'reference': part(optim.fixed)},
  )
