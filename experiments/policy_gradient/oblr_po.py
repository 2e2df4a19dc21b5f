"""OBLR-PO (arXiv:2511.23310): the baseline of least variance, and steps that know their noise.

A_i = R_i - sum_j w_j R_j / sum_j w_j in the group, w the squared norm of the row's score; loss =
mean over rows of -A log pi(y). A step is scaled by SNR / (1 + SNR), SNR = ||g||^2 over the
variance of its estimate. Ours: w is taken in the logits, where it needs no backward pass; the SNR
comes from the gradients of two halves of the batch (which share groups), as a running mean; Adam's
whole step is scaled.

Confidence: DERIVED (formulas), MEMORY (estimators).
Card: 34.

    python -m polgrad.train --config=experiments/policy_gradient/oblr_po.py --workdir=runs/oblr_po
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives, optim
from polgrad.losses import aggregation, baselines, logit_stats, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  adamw = part(optim.adamw, learning_rate=1e-3)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(baselines.gradient_weighted)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    rollouts={'stats': {'score_norm': part(logit_stats.score_norm)}},
    optimizer=part(optim.signal_to_noise, optimizer=adamw, decay=0.9),
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
