from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, prefix_values
from polgrad.methods.base import Method
from polgrad.registry import part
from polgrad.sampling import behavior_policies


def cd_fudge() -> Method:
  """CD-FUDGE (arXiv:2310.17022): a scorer of prefixes learns the reward of their continuations.

      loss = token mean of (V(x, y_1..t) - R)^2 / 2,   y sampled from the teacher

  The trained model is a scorer, not a policy: its logits are values of next tokens. The anchor `teacher`
  is the model whose decoding it will steer. It samples the rows and is never changed. If the run names
  no model for it, it is a copy of the policy when the phase begins.

  A run's held-out accuracy is that of the scorer alone, which takes the token of the highest value.
  Decode with `behavior_policies.controlled`, `sampling.blockwise` or `python -m polgrad.sample
  --scorer=...` (docs/controlled_decoding.md).

  Differences: the scorer has a value for every next token in place of one for the prefix, and begins as
  the model itself.

  Confidence: PAPER (formula, as notes on the paper give it), MEMORY (constants).
  """
  return Method(
    collect=partial(
      collect.Rollouts, behavior_policy=part(behavior_policies.teacher), temperature=1.0
    ),
    objective=part(
      objectives.PrefixValues,
      target=part(prefix_values.monte_carlo),
      aggregation=part(aggregation.token_mean),
    ),
    anchors={'teacher': part(optim.fixed)},
    learns='imitate',
  )
