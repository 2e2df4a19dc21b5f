from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, logit_stats, penalties, selections, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def lp_reg(*, kappa: float = 0.02, fraction: float = 0.01, kl_coefficient: float = 1.0) -> Method:
  """Lp-Reg (arXiv:2510.03222): unlikely tokens that are not noise are protected.

      loss = token mean of -min(r A, clip(r, 0, 10) A)
             + kl_coefficient k3(pi, proxy) 1[token is selected]

  r = pi / pi_old, and A is the group-normalised reward. The proxy is the policy before the updates
  on a rollout, without the tokens whose probability is below `kappa` times the largest one. A token
  is selected if it is among the least likely ones with A < 0 of the minibatch (`fraction` of these)
  and the proxy gives it a higher probability than the policy. If `fraction` of these are fewer than
  two tokens, none is selected. k3 is the penalty of `grpo` with the proxy as reference, at most 10.

  Differences: The paper replaces the loss of selected tokens. Adding the penalty is equivalent,
  because the clip never binds where A < 0.

  Args:
    kappa: smallest probability in the proxy, as a fraction of the largest one.
    fraction: candidates for selection, as a fraction of the tokens with A < 0.
    kl_coefficient: of k3 to the proxy.

  Confidence: CODE.
  """
  return Method(
    collect=partial(
      collect.Rollouts, stats={'proxy_logp': part(logit_stats.proxy_logp, kappa=kappa)}
    ),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=1.0, eps_high=9.0),
      aggregation=part(aggregation.token_mean),
      selections={'selected': part(selections.unlikely, share=fraction)},
      penalties={'protection': weighted(kl_coefficient, part(penalties.selected_k3))},
    ),
    minibatches=2,
  )
