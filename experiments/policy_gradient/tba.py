"""TBA (arXiv:2503.18929): trajectory balance on samples of any age, with log Z from the group.

loss = mean over rows of (zeta - group mean)^2, zeta = R / beta - log(pi / reference), the mean
detached. At rest pi = reference exp(R / beta) / Z, whoever sampled, so half of the groups come from
a memory of the last four batches. beta = 0.1 here and 0.014 with 20 samples in the paper.
Confidence: CODE (formula), MEMORY (share of the memory).
Card: 152.

    python -m polgrad.train --config=experiments/policy_gradient/tba.py --workdir=runs/tba
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import objectives, optim
from polgrad.losses import implicit_rewards, log_partition
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.log_ratio_sum),
      center=part(log_partition.group_mean_detached),
      beta=0.1,
      scale=2.0,
      rows_per_prompt=o.group,
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
    rollouts={'replay': 4, 'replay_fraction': 0.5},
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
