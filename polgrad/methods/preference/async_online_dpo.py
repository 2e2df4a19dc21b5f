from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def async_online_dpo(
  *, beta: float = 0.1, lag: int = 1, samples: int = 4, unfinished: float = -1.0
) -> Method:
  """Asynchronous online DPO (arXiv:2410.18252): online DPO on samples of an older policy.

      loss = mean over pairs of softplus(-beta h)
      h = log(pi / reference)(best) - log(pi / reference)(worst)

  While the policy learns from one batch, the next one is sampled, so a batch is `lag` steps old when it
  is used. Of the methods that the paper compares, online DPO suffers least from this. Pairs are the best
  and the worst of a few samples. The reward of an answer without a stop token is `unfinished`.

  Differences: Pairs of equal rewards are left out; the paper keeps them. Sampling is at temperature 0.7,
  and log-probs are taken at the temperature of sampling, as in the authors' code.

  Args:
    beta: coefficient of the KL to the reference.
    lag: batches between sampling and use.
    samples: answers of a prompt.
    unfinished: reward of an answer without a stop token.

  Confidence: CODE.
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=samples,
      choose=part(collect.picks.best_worst),
      unfinished_reward=unfinished,
      lag=lag,
      temperature=0.7,
    ),
    credit=part(credit.preference),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=beta,
    ),
    anchors={'reference': part(optim.fixed)},
  )
