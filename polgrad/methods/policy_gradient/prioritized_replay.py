from functools import partial

from polgrad import collect, credit, objectives
from polgrad.collect import replay as replays
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def prioritized_replay(
  *,
  steps: int,
  replay: int = 4,
  replay_fraction: float = 0.5,
  exponent: float = 0.6,
  correction: float = 0.4,
  eps: float = 0.2,
) -> Method:
  """Prioritised replay of groups (arXiv:1511.05952): for GRPO, those whose rewards differ come again.

      P_i = p_i^exponent / sum_j p_j^exponent,   p_i = std of the rewards of group i + 0.001
      w_i = (n P_i)^-b / max_j w_j over the n groups that are remembered
      loss = -token mean of w min(r A, clip(r, 1 - eps, 1 + eps) A)

  Half of the groups of a batch are drawn from those of earlier batches, independently and with the
  probabilities P; for new groups w is 1. b rises linearly from `correction` to 1 during the run. r is
  the ratio to the policy that sampled the row, and A the group-normalised reward.

  Differences: The paper learns a value function, and the priority of a transition is its error; here the
  unit is the group of a prompt. New groups, which it does not train on at once, are our choice, and so
  are the sizes of memory and fraction.

  Args:
    steps: batches of the run, in which b rises to 1; the run fills it in.
    replay: batches that are remembered.
    replay_fraction: fraction of the groups of a batch that are drawn from them.
    exponent: of the priorities; 0 draws all alike, with the weight 1.
    correction: b of the first step.
    eps: distance of the clipping bounds from 1.

  Confidence: PAPER (probabilities and weights), DERIVED (groups).
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      replay=replay,
      replay_fraction=replay_fraction,
      replay_priority=part(replays.deviation),
      replay_exponent=exponent,
      replay_correction=correction,
      replay_correction_steps=steps,
    ),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
      weights={'replay': part(weights.replayed)},
    ),
    minibatches=2,
  )
