from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, listwise
from polgrad.methods.base import Method
from polgrad.registry import part


def exo_reward(
  *,
  candidates: int,
  samples_per_prompt: int,
  beta: float = 0.5,
  alpha: float = 0.5,
  sampled: bool = False,
) -> Method:
  """EXO on rewards (arXiv:2402.00856): the reverse KL to the distribution that rewards give.

      loss = mean over prompts of KL(q, p),  q = softmax(beta D),  p = softmax(R / alpha)
      D_k = log(pi / reference)(completion k)

  The softmaxes are over the completions of a prompt. `infonca` is the other direction of this
  divergence: it covers all good completions, while this one seeks the best.

  The defaults of beta and alpha are those of the authors' dialogue and summary runs; their runs on IMDB
  have 0.1 for both.

  Args:
    candidates: completions of a record in the data; the run fills it in.
    samples_per_prompt: completions of a group that is sampled; the run fills it in.
    beta: coefficient of the KL to the reference.
    alpha: temperature of the rewards, in their units, above 0.
    sampled: whether the completions are sampled by the policy and judged by the task's verifiers,
      instead of read from the data.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts if sampled else collect.Lists),
    objective=part(
      objectives.Listwise,
      score=part(implicit_rewards.log_ratio_sum),
      loss=part(listwise.exo, alpha=alpha),
      beta=beta,
      rows_per_prompt=samples_per_prompt if sampled else candidates,
    ),
    anchors={'reference': part(optim.fixed)},
  )
