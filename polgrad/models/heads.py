"""Further layers whose parameters are trained, stored and placed with those of a model.

This module knows nothing of what the layers compute; `objectives.heads` makes and reads them.

Their parameters are the entry `head` of the tree, a nested dict of arrays `weight` [inputs, outputs] and
`bias` [outputs]. Beside the weights of a Hugging Face folder they are the files `FILE`, a safetensors
file whose tensors have names such as `encoder/pair/0/weight`, and `SETTINGS`, which says what they are.
"""

import json
import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from polgrad import jsons, paths
from polgrad.models.policy import Policy
from polgrad.models.tensors import Tensor, check_shapes, open_file, write_file
from polgrad.sharding import place
from polgrad.types import Array, Params

FILE, SETTINGS = 'head.safetensors', 'head.json'
AXES = {'weight': ('embed', 'mlp'), 'bias': ('mlp',)}


def with_head(policy: Policy, init: Callable[[Array, int], Params], folder: str = '') -> Policy:
  """The policy with the parameters of further layers, which are trained.

  Args:
    policy: the model.
    init: (key, width) -> random parameters of the layers; `width` is that of the model.
    folder: from which the model is read; if it has the file of such layers, they are read too. ''
      is none.

  Raises:
    ValueError: from `init` of the policy, layers in the folder of other shapes.
  """
  width = policy.config.width
  shapes = lambda: jax.eval_shape(lambda: init(jax.random.key(0), width))

  def init_both(key, shardings=None):
    own = None if shardings is None else shardings['head']
    params = policy.init(key, None if shardings is None else without_head(shardings))
    if folder and (paths.path(folder) / FILE).exists():
      found = read(folder, shapes())
      head = jax.tree.map(jnp.asarray, found) if own is None else place(found, own)
    else:
      random = jax.jit(lambda key: init(jax.random.fold_in(key, 1), width), out_shardings=own)
      head = random(key)
    return {**params, 'head': head}

  def beside(of_model, of_head):
    """Functions of the tree, or of a part of it that an update changes."""

    def both(tree):
      found = of_model(without_head(tree))
      if 'head' in tree:
        found = {**found, 'head': jax.tree_util.tree_map_with_path(of_head, tree['head'])}
      return found

    return both

  return policy._replace(
    shapes=lambda: {**policy.shapes(), 'head': shapes()},
    init=init_both,
    axes=beside(policy.axes, lambda path, x: AXES[path[-1].key]),
    labels=beside(policy.labels, lambda path, x: 'train'),
  )


def without_head(tree: Params) -> Params:
  """The parameters of the model alone."""
  return {name: x for name, x in tree.items() if name != 'head'}


def save(folder: pathlib.Path, params: Params, settings: Mapping) -> None:
  """Writes the layers into a folder.

  Args:
    folder: that exists.
    params: of the layers, NumPy arrays.
    settings: what the layers are, as JSON.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  write_file(
    folder / FILE, {n: Tensor(x.shape, np.dtype(x.dtype), x.__getitem__) for n, x in flat.items()}
  )
  (folder / SETTINGS).write_text(json.dumps(dict(settings), indent=2), encoding='utf-8')


def read(folder: str | pathlib.Path, shapes: Params) -> Params:
  """The layers in a folder as NumPy arrays.

  Raises:
    FileNotFoundError: the file is missing.
    ValueError: an incomplete file, or tensors that `tensors.check_shapes` refuses.
  """
  path = paths.path(folder) / FILE
  wanted = traverse_util.flatten_dict(shapes, sep='/')
  found = open_file(path)
  check_shapes(path, found, {name: x.shape for name, x in wanted.items()})
  arrays = {name: found[name].all().astype(x.dtype) for name, x in wanted.items()}
  return traverse_util.unflatten_dict(arrays, sep='/')


def settings(folder: str | pathlib.Path) -> dict:
  """What the layers in a folder are.

  Raises:
    FileNotFoundError: the folder has none.
  """
  path = paths.path(folder) / SETTINGS
  if not path.is_file():
    raise FileNotFoundError(
      f'{folder}: there is no {SETTINGS}, so the folder has no further layers'
    )
  return jsons.read_object(path)
