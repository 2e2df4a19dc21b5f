"""Heads of reward models: what is read off the state of the model at the last token of each row.

The usual head is one vector of the model, whose product with the state is the score
(`config.model.value_head`). The others here are small networks with parameters that are trained with
the model: `build` adds them to its parameters, under the name `head`, so optimizers, meshes and
checkpoints treat them like all others. A head reads the states of several rows together, for example
those of the pairs of one user, and its results are fields of `types.Outputs`.
"""

import abc
import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp

from polgrad.losses import latent_preferences, shared_information
from polgrad.registry import AtLeastOne, Range, table
from polgrad.types import Array, Batch, Params

SEVERAL = Annotated[int, Range(at_least=2)]


class Head(abc.ABC):
  """Layers on the states of rows; the base class.

  Attributes:
    makes: fields of `Outputs` that `read` gives; empty for a head that is part of the model itself.
    requires: features of the batch that it reads.
    rows_per_prompt: number of consecutive rows of one record.
    prompts_together: number of consecutive records that it reads together, so that they are never split.
    scores: whether it gives the score, so that whoever uses the model needs its layers.
  """

  makes: frozenset[str] = frozenset()
  requires: frozenset[str] = frozenset()
  rows_per_prompt: int = 2
  prompts_together: int = 1
  scores: bool = False

  @abc.abstractmethod
  def init(self, key: Array, width: int) -> Params:
    """Random parameters, a nested dict of arrays named `weight` [inputs, outputs] and `bias` [outputs].

    Args:
      key: of the random numbers.
      width: size of a state of the model.
    """

  @abc.abstractmethod
  def read(self, params: Params, states: Array, batch: Batch, *, sampled: bool) -> dict[str, Array]:
    """The fields in `makes`, each f32[B].

    Args:
      params: of `init`.
      states: [B, D], of the model at the last token of each row.
      batch: with the tokens of the rows and the features in `requires`.
      sampled: whether random variables are drawn, as in training; otherwise they are their means.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scalar(Head):
  """The scalar head of the model itself, `values_after`; it has no further layers."""

  def init(self, key: Array, width: int) -> Params:
    return {}

  def read(self, params: Params, states: Array, batch: Batch, *, sampled: bool) -> dict[str, Array]:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentUser(Head):
  """A score for a user who is a latent variable, see `losses.latent_preferences`.

  The rows of a record are a pair, and then `context` further pairs of the same user, the preferred row
  of each first (`collect.UserPreferences`). The posterior is that of these further pairs, without those
  that have no tokens, and both rows of the first pair are scored with one draw of it.

  Attributes:
    context: number of further pairs.
    latent: size of the latent.
    hidden: size of the hidden layers.
    attention: whether the further pairs attend to each other.
    normalize: whether a latent is scaled to the length sqrt(latent).
  """

  context: AtLeastOne = 8
  latent: AtLeastOne = 512
  hidden: AtLeastOne = 512
  attention: bool = True
  normalize: bool = True

  makes = frozenset({'user_score', 'user_kl'})
  requires = frozenset({'uniform'})
  scores = True

  @property
  def rows_per_prompt(self) -> int:
    return 2 + 2 * self.context

  def init(self, key: Array, width: int) -> Params:
    sizes = dict(latent=self.latent, hidden=self.hidden, attention=self.attention)
    return latent_preferences.init(key, width=width, **sizes)

  def read(self, params: Params, states: Array, batch: Batch, *, sampled: bool) -> dict[str, Array]:
    size = self.rows_per_prompt
    rows = states.reshape(-1, size, states.shape[-1]).astype(jnp.float32)
    there = jnp.any(batch.segment_ids > 0, axis=1).reshape(-1, size)
    posterior = latent_preferences.encode(
      params, rows[:, 2::2], rows[:, 3::2], there[:, 2::2] & there[:, 3::2]
    )
    noise = jnp.zeros_like(posterior.mean)
    if sampled:
      noise = _normal(batch['uniform'].reshape(-1, size)[:, 0], self.latent)
    z = latent_preferences.sample(posterior, noise, normalize=self.normalize)
    # Only the first pair is scored; the scores of the others, which no loss reads, are 0.
    score = latent_preferences.reward(params, rows[:, :2], jnp.repeat(z[:, None], 2, axis=1))
    score = jnp.pad(score, ((0, 0), (0, size - 2)))
    kl = latent_preferences.prior_kl(posterior)
    return {'user_score': score.reshape(-1), 'user_kl': jnp.repeat(kl, size)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedViews(Head):
  """The representation loss of RLP, see `losses.shared_information`; the score is the scalar head's.

  The rows of a record are a pair, and then two samples of one policy for the same prompt
  (`collect.SampledPreferences`). The critic learns to tell codes of one prompt from codes
  of different prompts, among those of a block of consecutive records.

  Attributes:
    block: records of a block, which is never split; it divides the records of a batch.
    code: size of a code.
    hidden: size of the hidden layers.
  """

  block: SEVERAL = 4
  code: AtLeastOne = 128
  hidden: AtLeastOne = 512

  makes = frozenset({'view_loss'})
  requires = frozenset({'uniform'})
  rows_per_prompt = 4

  @property
  def prompts_together(self) -> int:
    return self.block

  def init(self, key: Array, width: int) -> Params:
    return shared_information.init(key, width=width, code=self.code, hidden=self.hidden)

  def read(self, params: Params, states: Array, batch: Batch, *, sampled: bool) -> dict[str, Array]:
    rows = states.reshape(-1, self.block, 4, states.shape[-1]).astype(jnp.float32)
    mean, std = shared_information.encode(params, rows[:, :, 2:])
    z = mean
    if sampled:
      uniform = batch['uniform'].reshape(-1, self.block, 4)[:, :, 2:]
      z = mean + std * _normal(uniform, self.code)
    first, second = (lambda x, i=i: x[:, :, i] for i in (0, 1))
    kl = shared_information.symmetric_kl(first(mean), first(std), second(mean), second(std))
    counted = jnp.any(batch.mask, axis=1).reshape(-1, self.block, 4)[:, :, 0]
    critic = shared_information.critic(params, first(z), second(z))
    loss = kl - shared_information.jensen_shannon(critic, counted)
    return {'view_loss': jnp.repeat(loss.reshape(-1), 4)}


def row_keys(uniform: Array) -> Array:
  """Random keys [B], each made of the uniform number [B] of its row.

  So the noise of a row does not depend on how the batch was cut.
  """
  bits = jax.lax.bitcast_convert_type(uniform.astype(jnp.float32), jnp.uint32)
  return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(bits)


def _normal(uniform: Array, size: int) -> Array:
  """Standard normal vectors [..., size], each seeded by one uniform number [...], see `row_keys`."""
  draw = lambda key: jax.random.normal(key, (size,))
  return jax.vmap(draw)(row_keys(uniform.reshape(-1))).reshape(*uniform.shape, size)


TABLE = table('heads', Scalar, LatentUser, SharedViews)
Part = Annotated[Head, TABLE]
