"""ReMax (arXiv:2310.10505): REINFORCE with the reward of the greedy answer as the baseline.

A_i = R_i - R(greedy answer to the prompt); loss = -mean over sequences of A * log pi(y). Unbiased,
since the greedy answer does not depend on the sample. The paper draws one sample a prompt and adds
a KL penalty to the reward; we draw `group` samples against one greedy answer, without KL.
Confidence: CODE.
Card: S3.

    python -m polgrad.train --config=experiments/policy_gradient/remax.py --workdir=runs/remax
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import aggregation, baselines, surrogates
from polgrad.registry import part
from polgrad.sampling import behavior_policies


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(baselines.sampled_baseline)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    rollouts={'baseline_policy': part(behavior_policies.greedy), 'baseline_samples': 1},
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
