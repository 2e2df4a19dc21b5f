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
  rate_field: str = '',
) -> Method:
  """SPO (arXiv:2509.13232): one completion a prompt; its baseline is the prompt's success rate so far.

      loss = token mean of L
      L = -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), and at most -cap A where A < 0
      A_i = (a_i - mean) / (std + 1e-8) over the batch, a_i = R_i - v_i

  r = pi / pi_old. v is estimated from earlier steps by discounted counts of successes and failures, and
  prompts are drawn with weights sqrt(v (1 - v)) + 0.05: the curriculum `spo`. There is no KL.

  Differences: Counts decay at one rate; in the paper it lies between 0.875 and 0.96 and follows how far
  the policy has moved on the stored completion of the prompt. Eight completions of each prompt before
  training, with which the paper's counts start, are used only if `rate_field` names their success rate.

  Args:
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.
    cap: largest ratio itself where A < 0.
    decay: weight of the earlier counts of a prompt that is drawn again.
    rate_field: field of the records with a success rate that was measured before; '' is none.

  Confidence: CODE (apart from the fixed decay).
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=1),
    curriculum=part(curricula.spo, decay=decay, rate_field=rate_field),
    credit=part(credit.outcome, advantage=part(baselines.tracked_baseline)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.dual_clipped, eps_low=eps_low, eps_high=eps_high, cap=cap),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=4,
  )
