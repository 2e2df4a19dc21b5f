from functools import partial

from polgrad import collect, credit, curricula, objectives
from polgrad.losses import aggregation, baselines, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def spo_single_stream(
  *,
  eps_low: float = 0.2,
  eps_high: float = 0.28,
  cap: float = 10.0,
  decay: float = 0.875,
  slow_decay: float = 0.96,
  half_drift: float = 0.06,
  rate_field: str = '',
  term: str = '',
) -> Method:
  """SPO (arXiv:2509.13232): one completion a prompt; its baseline is the prompt's success rate so far.

      loss = token mean of L
      L = -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), and at most -cap A where A < 0
      A_i = (a_i - mean) / (std + 1e-8) over the batch, a_i = R_i - v_i
      v = alpha / (alpha + beta),   alpha <- rho alpha + R,   beta <- rho beta + 1 - R
      rho = clip(2^(-D / half_drift), decay, slow_decay)

  r = pi / pi_old. v is from before the step, and only the prompts of a step are updated. D says how far
  the policy has moved: the mean |log pi now - log pi then| over the tokens of the last completion of the
  prompt, both after the updates of their step; it is 0 at the first. Prompts are drawn with weights
  sqrt(v (1 - v)) + 0.05, without replacement: the curriculum `spo`. There is no KL.

  Differences: R is cut to [0, 1], in the baseline and in the advantage; the authors cut it at 0. Eight
  completions of each prompt before training, with which the paper's counts start, are used only if
  `rate_field` names their success rate.

  Args:
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.
    cap: largest ratio itself where A < 0.
    decay: least weight of the earlier counts of a prompt that is drawn again.
    slow_decay: largest weight of them; 0: the weight is always `decay`, and no completion is stored.
    half_drift: D at which rho would be 1/2 without bounds, nats.
    rate_field: field of the records with a success rate that was measured before; '' is none.
    term: name of the term of the reward that is R, in v and in A; '' is the whole reward.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=1, **({'terms': (term,)} if term else {})),
    curriculum=part(
      curricula.spo,
      decay=decay,
      slow_decay=slow_decay,
      half_drift=half_drift,
      rate_field=rate_field,
      term=term,
    ),
    credit=part(
      credit.of_term,
      credit=part(credit.outcome, advantage=part(baselines.tracked_baseline)),
      term=term,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.dual_clipped, eps_low=eps_low, eps_high=eps_high, cap=cap),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=4,
  )
