from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, divergences, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def mdpo(*, steps: int, learning_rate: float) -> Method:
  """MDPO (arXiv:2005.09814): every rollout is one step of mirror descent, solved by several updates.

  loss = token mean of -r A + (1 / t_k) KL(pi || pi_old), t_k = 1 - (k - 1) / K at rollout k of K.
  The KL is exact, over the vocabulary at each token; pi_old is the anchor `teacher`, which follows
  the policy after the updates of a rollout. They lead towards pi_old exp(t_k A), and the first of
  them is the plain policy gradient. Ours: 4 updates for 10, whitened rewards of the group for GAE, a
  constant learning rate.

  Confidence: CODE (on-policy form), DERIVED (per token of a language model).
  """
  updates = 4
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
