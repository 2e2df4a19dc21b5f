"""Lp-Reg (arXiv:2510.03222): unlikely tokens that are no noise are protected from bad luck.

loss = token mean of -min(r A, clip(r, 0, 10) A) + 1.0 k3(pi, proxy) on selected tokens: the 1 %
least likely of those with A < 0, where the proxy finds them more likely than the policy does. The
proxy is the policy at the start of the updates without tokens of p < 0.02 max p. With A < 0 the
clip never binds, so adding the penalty is the paper's replacement of the loss. The 1 % are of the
minibatch; fewer than two tokens are none.

Confidence: CODE.
Card: 50.

    python -m polgrad.train --config=experiments/policy_gradient/lp_reg.py --workdir=runs/lp_reg
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, logit_stats, penalties, selections, surrogates
from polgrad.registry import part, weighted


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=1.0, eps_high=9.0),
      aggregation=part(aggregation.token_mean),
      selections={'selected': part(selections.unlikely, share=0.01)},
      penalties={'protection': weighted(1.0, part(penalties.selected_k3))},
    ),
    rollouts={'stats': {'proxy_logp': part(logit_stats.proxy_logp, kappa=0.02)}},
    minibatches=2,
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
