"""DAPO (arXiv:2503.14476): clip-higher, token mean, dynamic sampling, soft overlong punishment.

loss = -token mean of min(r A, clip(r, 0.8, 1.28) A), A group-normalised; no KL. Groups whose
rewards are all equal are replaced by fresh prompts, at most `max_resamples` times a step; what is
then still uninformative stays, with zero advantage; the paper resamples without bound.
Confidence: CODE (formula as in verl's recipe).
Card: S9.

    python -m polgrad.train --config=experiments/policy_gradient/dapo.py --workdir=runs/dapo
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.28),
      aggregation=part(aggregation.token_mean),
    ),
    reward={
      'exact': weighted(1.0, part(verifiers.exact_match)),
      'overlong': weighted(1.0, part(verifiers.soft_overlong, max_length=5, cache=1)),
    },
    rollouts={'max_resamples': 2},
    minibatches=2,
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
