"""GPG (arXiv:2504.02546): REINFORCE with a group mean, rescaled by the groups that teach something.

A_i = B / (B - M) (R_i - mean_g), M the rows in groups of equal rewards; loss = -token mean of A
log pi. No ratio, clip, KL or standard deviation. The published code has B / #{R != 0} in the place
of B / (B - M): `baselines.nonzero_mean`.
Confidence: CODE (loss), PAPER (factor).
Card: S13.

    python -m polgrad.train --config=experiments/policy_gradient/gpg.py --workdir=runs/gpg
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import aggregation, baselines, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(baselines.informative_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
    ),
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
