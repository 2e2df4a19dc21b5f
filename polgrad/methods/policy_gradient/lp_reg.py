from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, logit_stats, penalties, selections, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def lp_reg() -> Method:
  """Lp-Reg (arXiv:2510.03222): unlikely tokens that are no noise are protected from bad luck.

  loss = token mean of -min(r A, clip(r, 0, 10) A) + 1.0 k3(pi, proxy) on selected tokens: the 1 %
  least likely of those with A < 0, where the proxy finds them more likely than the policy does. The
  proxy is the policy at the start of the updates without tokens of p < 0.02 max p. With A < 0 the
  clip never binds, so adding the penalty is the paper's replacement of the loss. The 1 % are of the
  minibatch; fewer than two tokens are none.

  Confidence: CODE.
  """
  return Method(
    collect=partial(
      collect.Rollouts, stats={'proxy_logp': part(logit_stats.proxy_logp, kappa=0.02)}
    ),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=1.0, eps_high=9.0),
      aggregation=part(aggregation.token_mean),
      selections={'selected': part(selections.unlikely, share=0.01)},
      penalties={'protection': weighted(1.0, part(penalties.selected_k3))},
    ),
    minibatches=2,
  )
