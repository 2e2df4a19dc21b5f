"""Training techniques from outside reinforcement learning: small pure functions that any loop may call.

No configuration selects them. docs/techniques.md has a runnable example of each.

    module            what it computes
    ----------------  -----------------------------------------------------------------------------
    decoupled_mixup   a loss of mixed inputs that keeps the classifier decisive
    monge_gap         how far a map is from moving points at the least cost
    noise_mask        noise on inputs, whose place is learned by a policy gradient
    ode_penalties     an ODE solver, and penalties on its error estimates and on stiffness
    sparse_transport  optimal transport with at most k entries in each column
"""

from polgrad.techniques import (
  decoupled_mixup,
  monge_gap,
  noise_mask,
  ode_penalties,
  sparse_transport,
)

__all__ = [
  'decoupled_mixup',
  'monge_gap',
  'noise_mask',
  'ode_penalties',
  'sparse_transport',
]
