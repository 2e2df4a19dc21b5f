from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def ce_gppo(*, eps: float = 0.2, beta_low: float = 0.75, beta_high: float = 1.0) -> Method:
  """CE-GPPO (arXiv:2509.20712): tokens that PPO clips keep a bounded gradient.

      loss = -token mean of w r / sg(r) A
      w = beta_high (1 + eps)  where A > 0 and r > 1 + eps
          beta_low (1 - eps)   where A < 0 and r < 1 - eps
          r                    elsewhere

  r = pi / pi_old, and A is the group-normalised reward. The gradient weight of log pi is w A. Most
  tokens that are clipped are unlikely ones: the gradient of good ones keeps the entropy up, that of
  bad ones takes it down, and the two betas balance them. There is no KL. Groups whose rewards are all
  equal are replaced by groups of fresh prompts. A rollout is used for four minibatches, which let
  ratios leave 1.

  Differences: Groups are replaced at most once per batch, and those that still have equal rewards stay
  in it with zero advantage; the released code samples twice the prompts once and drops such groups. It
  uses a rollout for eight minibatches, and drops tokens with A < 0 and r > 10. Its run of a model of
  1.5B has beta_low=0.5, that of 7B 0.75.

  Args:
    eps: distance of the clipping bounds from 1.
    beta_low: scale of the gradient of bad tokens below the lower bound (the paper's beta_1); 0 is PPO.
    beta_high: scale of that of good tokens above the upper bound (the paper's beta_2); 0 is PPO.

  Confidence: CODE (loss and scripts of the authors' repository, Kwai-Klear/CE-GPPO).
  """
  return Method(
    collect=partial(collect.Rollouts, max_resamples=1),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(
        surrogates.gradient_preserving,
        eps_low=eps,
        eps_high=eps,
        beta_low=beta_low,
        beta_high=beta_high,
      ),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=4,
  )
