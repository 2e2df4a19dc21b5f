"""Training techniques from outside reinforcement learning: small pure functions that any loop may call.

No configuration selects them. docs/techniques.md has runnable examples.

    module               what it computes
    -------------------  ------------------------------------------------------------------------
    compression_policies policies that propose smaller networks: which layers stay, and their sizes
    decoupled_mixup      a loss of mixed inputs that keeps the classifier decisive
    dirichlet_policy     actions that are distributions, with exploration and entropy
    inexact_bilevel      hyperparameters by bilevel descent that is only as accurate as it has to be
    monge_gap            how far a map is from moving points at the least cost
    network_compression  rewards and credit of smaller networks that a policy proposes
    noise_mask           noise on inputs, whose place is learned by a policy gradient
    noisy_labels         early-learning regularisation, and losses of bags whose mean label is known
    ode_penalties        an ODE solver, and penalties on its error estimates and on stiffness
    self_tuning          hyperparameters learned through a model that knows how it responds to them
    sparse_transport     optimal transport with at most k entries in each column
"""

from polgrad.techniques import (
  compression_policies,
  decoupled_mixup,
  dirichlet_policy,
  inexact_bilevel,
  monge_gap,
  network_compression,
  noise_mask,
  noisy_labels,
  ode_penalties,
  self_tuning,
  sparse_transport,
)

__all__ = [
  'compression_policies',
  'decoupled_mixup',
  'dirichlet_policy',
  'inexact_bilevel',
  'monge_gap',
  'network_compression',
  'noise_mask',
  'noisy_labels',
  'ode_penalties',
  'self_tuning',
  'sparse_transport',
]
