"""The policies of N2N, which propose smaller networks than a teacher (arXiv:1709.06030).

A first policy reads the layers of the teacher and keeps or removes each. A second one starts from the
best student of the first, and chooses factors by which the sizes of its layers shrink. Both are
recurrent networks trained by REINFORCE; `network_compression` has rewards, credit, and the loss of
students.
"""

import chex
import jax
import jax.numpy as jnp

from polgrad.techniques.network_compression import FACTORS
from polgrad.types import Array, Params

sg = jax.lax.stop_gradient


def init_cell(key: Array, inputs: int, hidden: int) -> Params:
  """Parameters of `cell`, uniform up to 1 / sqrt(hidden)."""
  edge = hidden**-0.5
  shapes = {'inputs': (4, hidden, inputs), 'state': (4, hidden, hidden), 'bias': (4, hidden)}
  keys = jax.random.split(key, len(shapes))
  draw = lambda key, shape: jax.random.uniform(key, shape, minval=-edge, maxval=edge)
  return {name: draw(k, shape) for k, (name, shape) in zip(keys, shapes.items())}


def cell(params: Params, x: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
  """One step of an LSTM: c = sig(f) c + sig(i) tanh(g), h = sig(o) tanh(c): -> (h, c), [H] each.

  Args:
    params: from `init_cell`; its first axis has the gates i, f, g and o.
    x: [inputs].
    state: h and c of the step before, 0 at first.
  """
  h, c = state
  i, f, g, o = params['inputs'] @ x + params['state'] @ h + params['bias']
  c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
  return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _zeros(params: Params) -> tuple[Array, Array]:
  return (jnp.zeros_like(params['bias'][0]),) * 2


def _read(params: Params, x: Array, *, reverse: bool = False) -> Array:
  """Outputs of an LSTM for a sequence: [L, inputs] -> [L, H]."""

  def step(state, x):
    state = cell(params, x, state)
    return state, state[0]

  return jax.lax.scan(step, _zeros(params), x, reverse=reverse)[1]


def _head(key: Array, inputs: int, outputs: int) -> Params:
  edge = inputs**-0.5
  draw = lambda k, *shape: jax.random.uniform(k, shape, minval=-edge, maxval=edge)
  weights, bias = jax.random.split(key)
  return {'weights': draw(weights, outputs, inputs), 'bias': draw(bias, outputs)}


def init_removal(key: Array, features: int, *, hidden: int = 30, layers: int = 2) -> Params:
  """Parameters of `removal_logits`, for layers that have `features` numbers each."""
  keys = jax.random.split(key, 2 * layers + 1)
  size = lambda n: features if n == 0 else 2 * hidden
  both = [[init_cell(k, size(n), hidden) for k in keys[2 * n : 2 * n + 2]] for n in range(layers)]
  return {'cells': both, 'head': _head(keys[-1], 2 * hidden, 1)}


def removal_logits(params: Params, network: Array) -> Array:
  """Logits of keeping each layer, for `network_compression.keep_or_remove`: [L, F] -> [L].

  A bidirectional LSTM reads the layers, so each decision depends on the whole network.

  Args:
    params: from `init_removal`; Adam with 0.003 is usual.
    network: [L, F], numbers that describe each layer. The authors' are its type, the size of its kernel,
      stride, number of outputs and padding.
  """
  chex.assert_rank(network, 2)
  for ahead, back in params['cells']:
    network = jnp.concatenate([_read(ahead, network), _read(back, network, reverse=True)], axis=-1)
  return (network @ params['head']['weights'].T + params['head']['bias'][None])[:, 0]


def init_shrinkage(
  key: Array, features: int, *, hidden: int = 30, layers: int = 2, choices: int = len(FACTORS)
) -> Params:
  """Parameters of `propose` and `log_prob`."""
  keys = jax.random.split(key, layers + 1)
  cells = [init_cell(k, hidden if n else features, hidden) for n, k in enumerate(keys[:-1])]
  return {'cells': cells, 'head': _head(keys[-1], hidden, choices)}


def _decide(params: Params, network: Array, free: Array, given: Array, pick) -> tuple[Array, Array]:
  """Choices [L, F] of `pick`(logits, given[l, f]), one after the other, and their log-probabilities."""
  factors = jnp.array(FACTORS, network.dtype)

  def decide(carry, inputs):
    state, layer = carry
    place, allowed, given = inputs
    x, new = layer, []
    for one, old in zip(params['cells'], state):
      new.append(cell(one, x, old))
      x = new[-1][0]
    logits = params['head']['weights'] @ x + params['head']['bias']
    choice = pick(logits, given)
    logp = jnp.where(allowed, jax.nn.log_softmax(logits)[choice], 0)
    # The next decisions see this one.
    layer = layer.at[place].multiply(jnp.where(allowed, factors[choice], 1))
    return (new, layer), (choice, logp)

  def read(state, inputs):
    layer, free, given = inputs
    places = jnp.arange(layer.shape[0])
    (state, _), made = jax.lax.scan(decide, (state, layer), (places, free, given))
    return state, made

  start = [_zeros(one) for one in params['cells']]
  return jax.lax.scan(read, start, (network, free, given))[1]


def propose(key: Array, params: Params, network: Array, free: Array) -> Array:
  """Draws a factor for each number of each layer: i32[L, F], places in FACTORS.

  An LSTM decides one number after the other, and sees the layer as it has shrunk so far. It does not see
  the factor of a layer's last number, as in the released code.

  Args:
    key: a key of jax.random.
    params: from `init_shrinkage`; Adam with 0.1 is usual.
    network: [L, F], as for `removal_logits`.
    free: bool[L, F]; other numbers stay, and have no probability.
  """
  chex.assert_equal_shape([network, free])
  keys = jax.random.split(key, network.shape)
  return _decide(params, network, free, keys, lambda x, key: jax.random.categorical(key, x))[0]


def log_prob(params: Params, network: Array, free: Array, choices: Array) -> Array:
  """Log-probability with which `propose` makes these choices, i32[L, F]: -> []."""
  chex.assert_equal_shape([network, free, choices])
  return jnp.sum(_decide(params, network, free, choices, lambda _, given: given)[1])


def shrunk(network: Array, free: Array, choices: Array) -> Array:
  """The numbers of the smaller network, rounded down and at least 1: [L, F].

  >>> print(shrunk(jnp.array([[5.0, 10.0]]), jnp.array([[False, True]]), jnp.array([[0, 7]])))
  [[5. 7.]]
  """
  sizes = jnp.floor(network * jnp.array(FACTORS, network.dtype)[choices] + 1e-3)
  return jnp.where(free, jnp.maximum(sizes, 1), network)


def reinforce(logp: Array, advantages: Array) -> Array:
  """-mean of log-probability times advantage, over the rollouts of an epoch: [B] -> [].

  The authors had 5 rollouts an epoch and 100 epochs.

  Confidence: CODE.

  >>> print(reinforce(jnp.array([-1.0, -2.0]), jnp.array([0.5, -0.5])))
  -0.25
  """
  chex.assert_equal_shape([logp, advantages])
  return -jnp.mean(logp * sg(advantages))
