"""OTB (arXiv:2602.07078): the baseline of least variance for every position of the group.

b_t = sum_j W_jt G_jt / sum_j W_jt, W_jt = sum_{s <= t} |e - pi|^2 the squared score norm, in the
logits, of row j up to t; loss = -mean over sequences of sum_t (G_t - b_t) log pi. The paper
compares whole runs with other baselines; we take plain on-policy REINFORCE around it, one update a
rollout.
Confidence: CODE.
Card: S26.

    python -m polgrad.train --config=experiments/policy_gradient/otb.py --workdir=runs/otb
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import aggregation, logit_stats, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.token_baseline, discount=1.0),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    rollouts={'stats': {'score_norm': part(logit_stats.score_norm)}},
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
