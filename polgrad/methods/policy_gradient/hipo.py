from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers


def hipo(
  *,
  mode_pattern: str = '<think>',
  judged: int = 1,
  tie: float = 0.01,
  own: float = 0.3,
  eps_low: float = 0.2,
  eps_high: float = 0.2,
) -> Method:
  """HiPO (arXiv:2509.23967): whether to think is credited apart from what is answered.

      A of the choice = (mean of its mode - mean + own (R - mean)) / std
      A of the answer = (R - mean of its mode) / std of its mode
      loss = -token mean of min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)

  An answer is in the mode 'on' if it has a match of `mode_pattern`. Its first `judged` tokens choose the
  mode, the others answer. If 'on' is better than 'off' by at most tie times its mean, this is added to
  the mean of 'off', so the cheap mode wins where thinking hardly helps. With one mode, the choice has
  `own` times the group-normalised reward, and the answer has that reward itself.

  Differences: The paper's format reward of weight 0.2 is left to the task. Whether the paper takes the
  overall mean and deviation again after the tie is broken is not known to us; here it does not. The
  model must know both modes, for example from supervised data.

  Args:
    mode_pattern: regular expression that an answer in the mode 'on' matches.
    judged: number of tokens in which the mode is chosen.
    tie: how much better 'on' must be, in units of its mean reward.
    own: weight of the answer's own reward in the advantage of the choice.
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.

  Confidence: PAPER (rewards), MEMORY (advantages, loss).
  """
  return Method(
    collect=partial(collect.Rollouts, terms=('mode',)),
    credit=part(credit.modes, judged=judged, tie=tie, own=own),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps_low, eps_high=eps_high),
      aggregation=part(aggregation.token_mean),
    ),
    rewards={'mode': weighted(0.0, part(verifiers.count_matches, pattern=mode_pattern, most=1))},
    minibatches=2,
  )
