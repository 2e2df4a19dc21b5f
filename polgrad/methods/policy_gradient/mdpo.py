from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, divergences, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def mdpo(*, steps: int, learning_rate: float, updates: int = 4) -> Method:
  """MDPO (arXiv:2005.09814): each rollout is one step of mirror descent, solved by several updates.

      loss = token mean of -r A + (1 / t_k) KL(pi || pi_old),   t_k = 1 - (k - 1) / K

  at rollout k of K, with r = pi / pi_old. A is the reward minus the group mean, whitened over the
  batch. The KL is exact: it sums over the vocabulary at each token. pi_old is the anchor `teacher`,
  a copy of the policy that is renewed after the updates of a rollout. The updates lead towards
  pi_old exp(t_k A) / Z, and the first one is the plain policy gradient.

  Differences: There are 4 updates per rollout instead of 10, the advantages come from rewards
  instead of GAE, and the learning rate is constant.

  Args:
    steps: number of rollouts K; the run fills it in.
    learning_rate: of AdamW; the run fills it in.
    updates: updates per rollout, each on the whole rollout.

  Confidence: CODE (on-policy form), DERIVED (per token of a language model).
  """
  return Method(
    credit=part(
      credit.outcome,
      advantage=part(advantages.group_mean),
      normalizer=part(advantages.whiten),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.importance_weighted),
      aggregation=part(aggregation.token_mean),
      penalties={'kl': weighted(1.0, part(divergences.reverse_kl))},
      schedules={'kl': part(optim.inverse_linear, steps=steps, every=updates)},
    ),
    anchors={'teacher': part(optim.sync, every=updates)},
    optimizer=part(optim.adamw, learning_rate=learning_rate, max_grad_norm=0.5),
    epochs=updates,
  )
