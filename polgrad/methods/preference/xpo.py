from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import aggregation, implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part, weighted
from polgrad.sampling import behavior_policies


def xpo(*, beta: float = 0.1, alpha: float = 1e-5) -> Method:
  """XPO (arXiv:2405.21046): online DPO against the reference, with a bonus for exploration.

      loss = mean over pairs of softplus(-beta h) + alpha (mean over pairs of log pi(y'))
      h = log(pi / reference)(better) - log(pi / reference)(worse)
      y ~ pi,   y' ~ reference

  The pair is y and y', ranked by their rewards. The second term lowers the probability of the
  reference's answer, whichever is better, and so moves the policy to answers that were not seen. The
  log-probs are sums over the tokens of an answer.

  Differences: A pair of equal rewards is left out of both terms; TRL prefers the policy's answer. The
  theory fits all past data anew in each round.

  Args:
    beta: coefficient of the KL to the reference.
    alpha: of the bonus; 0 is online DPO against the reference.

  Confidence: CODE (TRL, oat), MEMORY (alpha of the paper's runs).
  """
  pairs = part(
    objectives.Pairwise,
    score=part(implicit_rewards.log_ratio_sum),
    link=part(preference_losses.logistic),
    beta=beta,
  )
  given = part(objectives.Supervised, aggregation=part(aggregation.sequence_sum), only='opponent')
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=1,
      opponents=1,
      opponent_policy=part(behavior_policies.reference),
    ),
    credit=part(credit.preference),
    objective=part(
      objectives.WeightedSum,
      streams={'preference': weighted(1.0, pairs), 'bonus': weighted(-alpha, given)},
    ),
    anchors={'reference': part(optim.fixed)},
  )
