"""A smaller model that is in every decoder: its first layers, with its final norm and unembedding."""

import dataclasses

from polgrad.models.policy import Policy
from polgrad.models.transformer import from_config


def first_layers(policy: Policy, layers: int) -> Policy:
  """The policy whose `decode` computes the first layers alone (arXiv:2309.08168, LayerSkip 2404.16710).

  It reads the unstacked parameters of `policy`, and it reads and writes a cache of `policy`, in which it
  leaves the later layers unchanged. Its keys and values are those that `policy` computes itself.

  Args:
    policy: a decoder.
    layers: how many of its layers, at least 1 and fewer than it has.

  Raises:
    ValueError: another number of layers.
  """
  config = policy.config
  if not 1 <= layers < config.num_layers:
    raise ValueError(
      f'layers={layers}: a part of the {config.num_layers} layers of a model has 1 to '
      f'{config.num_layers - 1} of them'
    )
  local = tuple(i for i in config.local_layers if i < layers)
  short = from_config(
    dataclasses.replace(
      config, num_layers=layers, local_layers=local, window=config.window if local else 0
    )
  )
  return policy._replace(decode=short.decode)
