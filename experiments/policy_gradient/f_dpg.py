"""f-DPG (arXiv:2302.08215): the policy gradient of an f-divergence to a target distribution.

Target p = reference exp(R / beta) / Z of whole rows; loss = mean over rows of -A log pi(y), A =
-f'(pi / p) - b, here the Jensen-Shannon divergence, f'(t) = (log t - log((t + 1) / 2)) / 2. Other
derivatives stand in `losses/f_divergences.py`: forward KL is the original DPG, reverse KL is
reinforcement with a KL penalty. Ours: Z is the mean over the group for one over all earlier
samples, b a moving average for a window of 1024, beta = 0.3, and on-policy samples.

Confidence: CODE.
Card: 120.

    python -m polgrad.train --config=experiments/policy_gradient/f_dpg.py --workdir=runs/f_dpg
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives, optim
from polgrad.losses import aggregation, f_divergences, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(
      credit.divergence_reward, derivative=part(f_divergences.jensen_shannon), beta=0.3, decay=0.9
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    anchors={'reference': part(optim.fixed)},
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
