"""Well-known methods by name, for use in another trainer.

Each function composes what its paper composes; the files in `experiments/` say the same as data,
and a test holds both together. A method is an `Estimator` (rewards to advantages or labels) and an
`Objective`.

    method = methods.grpo(kl_coefficient=0.04)
    terms, metrics = method.objective.apply(outputs, batch, method.objective.init(), step=0)
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from polgrad import credit, objectives
from polgrad.losses import (
  advantages,
  aggregation,
  divergences,
  implicit_rewards,
  log_partition,
  penalties,
  preference_losses,
  ratios,
  surrogates,
)
from polgrad.registry import Weighted


class Method(NamedTuple):
  """What turns a scored rollout, or labelled data, into a loss."""

  credit: credit.Estimator
  objective: objectives.Objective


def sft() -> Method:
  """Supervised fine-tuning: token mean of -log pi (standard)."""
  objective = objectives.Supervised(aggregation=aggregation.token_mean)
  return Method(credit.nothing(), objective)


def reinforce(*, decay: float = 0.9) -> Method:
  """REINFORCE with a moving-average baseline (Williams 1992)."""
  objective = objectives.PolicyGradient(
    surrogate=surrogates.reinforce, aggregation=aggregation.sequence_sum
  )
  return Method(credit.moving_baseline(decay=decay), objective)


def rloo(*, kl_coefficient: float = 0.03) -> Method:
  """RLOO: leave-one-out baseline, KL in the reward (arXiv:2402.14740)."""
  objective = objectives.PolicyGradient(
    surrogate=surrogates.reinforce, aggregation=aggregation.sequence_sum
  )
  return Method(
    credit.outcome(advantage=advantages.leave_one_out, kl_coefficient=kl_coefficient), objective
  )


def ppo(
  *,
  eps: float = 0.2,
  discount: float = 1.0,
  trace: float = 0.95,
  value_coefficient: float = 0.5,
  entropy_coefficient: float = 0.001,
) -> Method:
  """PPO with clipped values and whitened GAE (arXiv:1707.06347, 1506.02438)."""
  objective = objectives.PolicyGradient(
    surrogate=_clipped(eps, eps),
    aggregation=aggregation.token_mean,
    penalties={
      'value': Weighted(
        value_coefficient, functools.partial(penalties.clipped_value_error, eps=eps)
      ),
      'entropy': Weighted(entropy_coefficient, penalties.negative_entropy),
    },
  )
  return Method(
    credit.generalized(discount=discount, trace=trace, normalizer=advantages.whiten), objective
  )


def grpo(*, kl_coefficient: float = 0.04, eps: float = 0.2) -> Method:
  """GRPO with its k3 loss (arXiv:2402.03300)."""
  objective = objectives.PolicyGradient(
    surrogate=_clipped(eps, eps),
    aggregation=aggregation.sequence_mean,
    penalties={'kl': Weighted(kl_coefficient, penalties.k3)},
  )
  return Method(credit.outcome(advantage=advantages.group_normalized), objective)


def dr_grpo(*, length: int, eps: float = 0.2) -> Method:
  """Dr. GRPO: no std, and a constant `length` (the token budget) for lengths (arXiv:2503.20783)."""
  objective = objectives.PolicyGradient(
    surrogate=_clipped(eps, eps),
    aggregation=functools.partial(aggregation.constant_length, length=length),
  )
  return Method(credit.outcome(advantage=advantages.group_mean), objective)


def dapo(*, eps_low: float = 0.2, eps_high: float = 0.28) -> Method:
  """DAPO's loss (arXiv:2503.14476); its sampling and length reward belong to the rollout."""
  objective = objectives.PolicyGradient(
    surrogate=_clipped(eps_low, eps_high), aggregation=aggregation.token_mean
  )
  return Method(credit.outcome(advantage=advantages.group_normalized), objective)


def gspo(*, eps_low: float = 3e-4, eps_high: float = 4e-4) -> Method:
  """GSPO in its token form (arXiv:2507.18071)."""
  objective = objectives.PolicyGradient(
    surrogate=_clipped(eps_low, eps_high),
    ratio=ratios.sequence_geometric,
    aggregation=aggregation.sequence_mean,
  )
  return Method(credit.outcome(advantage=advantages.group_normalized), objective)


def cispo(*, cap: float = 5.0) -> Method:
  """CISPO: no token dropped, its weight cut at the ratio `cap` (arXiv:2506.13585)."""
  objective = objectives.PolicyGradient(
    surrogate=functools.partial(surrogates.truncated, cap=cap), aggregation=aggregation.token_mean
  )
  return Method(credit.outcome(advantage=advantages.group_normalized), objective)


def gmpo(*, eps: float = 0.4) -> Method:
  """GMPO: the geometric mean of clipped token ratios (arXiv:2507.20673)."""
  objective = objectives.PolicyGradient(
    surrogate=surrogates.importance_weighted,
    ratio=functools.partial(ratios.sequence_geometric_clipped, eps=eps),
    aggregation=aggregation.sequence_mean,
  )
  return Method(credit.outcome(advantage=advantages.group_normalized), objective)


def sapo(*, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Method:
  """SAPO: a soft gate in the place of the clip (arXiv:2511.20347)."""
  gate = functools.partial(
    surrogates.soft_gated, tau_positive=tau_positive, tau_negative=tau_negative
  )
  objective = objectives.PolicyGradient(surrogate=gate, aggregation=aggregation.sequence_mean)
  return Method(credit.outcome(advantage=advantages.group_normalized), objective)


def tba(*, beta: float = 0.1, rows_per_prompt: int = 8) -> Method:
  """TBA: trajectory balance with log Z from the group, on anybody's samples (arXiv:2503.18929)."""
  objective = objectives.Regression(
    score=implicit_rewards.log_ratio_sum,
    center=log_partition.group_mean_detached,
    beta=beta,
    scale=2.0,
    rows_per_prompt=rows_per_prompt,
  )
  return Method(credit.nothing(), objective)


def dpo(*, beta: float = 0.1, label_smoothing: float = 0.0) -> Method:
  """DPO (arXiv:2305.18290); `label_smoothing` gives cDPO."""
  objective = objectives.Pairwise(
    score=implicit_rewards.log_ratio_sum,
    link=preference_losses.logistic,
    beta=beta,
    label_smoothing=label_smoothing,
  )
  return Method(credit.nothing(), objective)


def ipo(*, tau: float = 0.1) -> Method:
  """IPO on summed log-ratios (arXiv:2310.12036)."""
  objective = objectives.Pairwise(
    score=implicit_rewards.log_ratio_sum,
    link=functools.partial(preference_losses.squared, target=1 / (2 * tau)),
  )
  return Method(credit.nothing(), objective)


def simpo(*, beta: float = 2.0, gamma: float = 0.5) -> Method:
  """SimPO (arXiv:2405.14734)."""
  objective = objectives.Pairwise(
    score=implicit_rewards.logp_mean, link=preference_losses.logistic, beta=beta, offset=gamma
  )
  return Method(credit.nothing(), objective)


def slic(*, threshold: float = 1.0, nll_coefficient: float = 0.1) -> Method:
  """SLiC-HF (arXiv:2305.10425)."""
  margin = objectives.Pairwise(
    score=implicit_rewards.logp_sum,
    link=functools.partial(preference_losses.hinge, threshold=threshold),
  )
  likelihood = objectives.Supervised(aggregation=aggregation.sequence_sum, preferred_only=True)
  objective = objectives.WeightedSum(
    streams={'margin': Weighted(1.0, margin), 'likelihood': Weighted(nll_coefficient, likelihood)}
  )
  return Method(credit.nothing(), objective)


def online_dpo(*, beta: float = 0.1) -> Method:
  """Online DPO: pairs are sampled, and labelled by their rewards (arXiv:2402.04792)."""
  return Method(credit.preference(), dpo(beta=beta).objective)


def on_policy_distillation() -> Method:
  """Reverse KL to a teacher on the student's samples (arXiv:2306.13649)."""
  objective = objectives.Distillation(
    divergence=divergences.reverse_kl, aggregation=aggregation.token_mean
  )
  return Method(credit.nothing(), objective)


def _clipped(eps_low: float, eps_high: float) -> Callable:
  return functools.partial(surrogates.clipped, eps_low=eps_low, eps_high=eps_high)
