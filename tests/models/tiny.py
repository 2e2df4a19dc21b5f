"""Two small models with everything in them, and rows to feed them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from polgrad.losses import logit_stats
from polgrad.models import Policy, decoder, token_stats
from polgrad.models.token_stats import unembedding
from polgrad.types import Array, Params

VOCAB = 23
SHAPE = dict(
  vocab_size=VOCAB, num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_dim=6, mlp_width=24,
  max_length=64,
)  # fmt: skip


@functools.cache
def policy(**overrides) -> Policy:
  return decoder(**{**SHAPE, **overrides})


@functools.cache
def params(seed: int = 0, **overrides) -> Params:
  """Random parameters; also those that begin at zero or one."""
  start = policy(**overrides).init(jax.random.key(seed))
  random = np.random.default_rng(seed)
  return jax.tree.map(lambda p: p + 0.2 * random.normal(size=p.shape).astype(np.float32), start)


def rows(seed: int, *shape: int) -> Array:
  return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, shape), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def logp(policy: Policy, params: Params, tokens: Array, segment_ids: Array) -> Array:
  """Log-probs as the trainer computes them."""
  return token_stats(
    policy.hidden(params, tokens, segment_ids),
    tokens,
    unembedding(policy, params),
    stats={'logp': logit_stats.logp},
  )['logp']
