"""The weight table: what well-known methods do on two rows, value and -dloss/dlogp.

Each method is put together from the parts directly. The numbers were computed from the papers'
formulas in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.losses import (
  aggregation,
  log_partition,
  penalties,
  pointwise,
  ratios,
  selections,
  surrogates,
  weights,
)
from polgrad.losses.implicit_rewards import log_ratio_sum

OLD = np.array([[-1.0, -0.5, -2.0], [-0.2, -1.5, -3.0]])
MASK = np.array([[True, True, True], [True, True, False]])
LOGP = OLD + np.array([[0.1, 0.6, -0.2], [-0.5, 0.3, 0.0]])
REFERENCE = OLD + np.array([[0.05, -0.1, 0.2], [0, 0.1, 0]])
BEHAVIOR = OLD + np.array([[0, -0.9, 0.1], [0.2, 0, 0]])
REWARDS = np.array([1.0, -0.5])
A = np.broadcast_to(REWARDS[:, None], OLD.shape)


def ratio(lp, old=OLD, level=ratios.token):
  return level(jnp.where(MASK, lp - old, 0), MASK)


def mean(loss, reduce=aggregation.token_mean, **knobs):
  return reduce(loss, MASK, **knobs).value()


def ppo(lp, **knobs):
  return surrogates.clipped(ratio(lp), A, **knobs)


def gspo(lp, eps):
  log_ratio = ratio(lp, level=ratios.sequence_geometric)
  loss = surrogates.clipped(log_ratio, A, eps_low=eps, eps_high=eps)
  return mean(loss, aggregation.sequence_mean)


def asynchronous_ppo(lp):
  """PPO around a proximal policy half way between behaviour and live policy, itself detached."""
  proximal = ratios.interpolated(lp, BEHAVIOR, np.array([2.0, 2.0]))
  weight = weights.truncated_importance(proximal, BEHAVIOR, cap=np.inf)
  return mean(weight * surrogates.clipped(ratio(lp, proximal), A))


def topr(lp, level, reduce):
  weight = weights.tapered(ratio(lp, level=level), REWARDS)
  return mean(weight * surrogates.reinforce(lp, A), reduce)


def gmpo(lp):
  log_ratio = ratios.sequence_geometric_clipped(ratio(lp), A, MASK, eps_low=0.4, eps_high=0.4)
  return mean(surrogates.importance_weighted(log_ratio, A), aggregation.sequence_mean)


def nft(lp, rate):
  signed = (1 - rate) * np.sign(A)
  return mean(surrogates.negative_aware(ratio(lp), signed, np.array([rate, rate])))


def m2po(lp):
  keep = selections.second_moment(ratio(lp), A, MASK, limit=0.04)
  return mean(weights.selected(keep) * surrogates.importance_weighted(ratio(lp), A))


def tba(lp, center):
  zeta = REWARDS / 0.5 - log_ratio_sum(lp, REFERENCE, MASK)
  return jnp.mean(jnp.square(zeta - center(zeta, np.zeros(2, np.int32))))


def p3o(lp, loss, **knobs):
  return jnp.mean(loss(lp, OLD, jnp.asarray(REWARDS), jnp.zeros(2, jnp.int32), MASK, **knobs))


def tis(proximal=OLD, **knobs):
  return weights.truncated_importance(proximal, BEHAVIOR, **knobs)


METHODS = {
  'REINFORCE, token_mean': (
    lambda lp: mean(surrogates.reinforce(lp, A)),
    (0.410000, [0.2, 0.2, 0.2], [-0.1, -0.1, 0]),
  ),
  'REINFORCE, sequence_mean': (
    lambda lp: mean(surrogates.reinforce(lp, A), aggregation.sequence_mean),
    (0.262500, [0.166667] * 3, [-0.125, -0.125, 0]),
  ),
  'REINFORCE, sequence_sum': (
    lambda lp: mean(surrogates.reinforce(lp, A), aggregation.sequence_sum),
    (1.025000, [0.5, 0.5, 0.5], [-0.25, -0.25, 0]),
  ),
  'REINFORCE, constant_length': (
    lambda lp: mean(surrogates.reinforce(lp, A), aggregation.constant_length, length=3),
    (0.341667, [0.166667] * 3, [-0.083333, -0.083333, 0]),
  ),
  'importance weighted': (
    lambda lp: mean(surrogates.importance_weighted(ratio(lp), A)),
    (-0.553565, [0.221034, 0.364424, 0.163746], [-0.060653, -0.134986, 0]),
  ),
  'PPO': (
    lambda lp: mean(ppo(lp)),
    (-0.409794, [0.221034, 0, 0.163746], [0, -0.134986, 0]),
  ),
  'PPO, dual clip at 1.2': (
    lambda lp: mean(surrogates.dual_clipped(ratio(lp), A, cap=1.2)),
    (-0.424780, [0.221034, 0, 0.163746], [0, 0, 0]),
  ),
  'clip-higher, token TIS': (
    lambda lp: mean(tis(cap=2.0) * ppo(lp, eps_high=0.28)),
    (-0.680713, [0.221034, 0, 0.148164], [0, -0.134986, 0]),
  ),
  'wide PPO, token TIS: decoupled PPO': (
    lambda lp: mean(tis(cap=2.0) * ppo(lp, eps_low=0.9, eps_high=0.9)),
    (-0.913401, [0.221034, 0.728848, 0.148164], [-0.049659, -0.134986, 0]),
  ),
  'wide PPO, sequence TIS': (
    lambda lp: mean(
      weights.truncated_sequence_importance(OLD, BEHAVIOR, MASK, cap=2.0)
      * ppo(lp, eps_low=0.9, eps_high=0.9)
    ),
    (-1.338233, [0.442068, 0.728848, 0.327492], [-0.049659, -0.110517, 0]),
  ),
  'wide PPO, IcePop': (
    lambda lp: mean(
      weights.masked_importance(OLD, BEHAVIOR, low=0.5, high=2.0)
      * ppo(lp, eps_low=0.9, eps_high=0.9)
    ),
    (-0.184553, [0.221034, 0, 0.148164], [-0.049659, -0.134986, 0]),
  ),
  'A-3PO': (
    asynchronous_ppo,
    (-0.685917, [0.221034, 0, 0.148164], [0, -0.134986, 0]),
  ),
  'CISPO': (
    lambda lp: mean(surrogates.truncated(lp, ratio(lp), A, cap=1.28)),
    (0.337515, [0.221034, 0.256, 0.163746], [-0.060653, -0.128, 0]),
  ),
  'GSPO, eps 0.2': (
    lambda lp: gspo(lp, 0.2),
    (-0.364471, [0.196893] * 3, [-0.113105, -0.113105, 0]),
  ),
  'GSPO, eps 0.15': (
    lambda lp: gspo(lp, 0.15),
    (-0.348791, [0, 0, 0], [-0.113105, -0.113105, 0]),
  ),
  'SAPO': (
    lambda lp: mean(surrogates.soft_gated(ratio(lp), A), aggregation.sequence_mean),
    (-0.646232, [0.183687, 0.257644, 0.135340], [-0.072671, -0.163165, 0]),
  ),
  'GMPO': (gmpo, (-0.314778, [0.184195, 0, 0.184195], [0, -0.118904, 0])),
  'TOPR': (
    lambda lp: topr(lp, ratios.sequence_product, aggregation.sequence_sum),
    (1.111103, [0.5, 0.5, 0.5], [-0.204683, -0.204683, 0]),
  ),
  'TOPR with token ratios': (
    lambda lp: topr(lp, ratios.token, aggregation.token_mean),
    (0.437543, [0.2, 0.2, 0.2], [-0.060653, -0.1, 0]),
  ),
  'REC-OneSide-NoIS': (
    lambda lp: mean(weights.one_sided(ratio(lp), A) * surrogates.reinforce(lp, A)),
    (0.5, [0.2, 0, 0.2], [0, -0.1, 0]),
  ),
  'REC-OneSide-IS': (
    lambda lp: mean(
      weights.one_sided(ratio(lp), A) * surrogates.truncated(lp, ratio(lp), A, cap=np.inf)
    ),
    (0.397189, [0.221034, 0, 0.163746], [0, -0.134986, 0]),
  ),
  'REC-TwoSide-NoIS': (
    lambda lp: mean(weights.two_sided(ratio(lp)) * surrogates.reinforce(lp, A)),
    (0.62, [0.2, 0, 0.2], [0, 0, 0]),
  ),
  'REC-Ring-NoIS': (
    lambda lp: mean(
      weights.ring(ratio(lp), A, outer_low=0.4, outer_high=1.3) * surrogates.reinforce(lp, A)
    ),
    (0.5, [0.2, 0, 0.2], [0, -0.1, 0]),
  ),
  'sPPO': (
    lambda lp: mean(
      weights.two_sided(ratio(lp), low=1 / 1.3, high=1.3) * surrogates.reinforce(lp, A)
    ),
    (0.62, [0.2, 0, 0.2], [0, 0, 0]),
  ),
  'NFT, success rate 1/2': (
    lambda lp: nft(lp, 0.5),
    (-0.083180, [0.1, 0.1, 0.1], [-0.043527, -0.134986, 0]),
  ),
  'NFT, success rate 1/4': (
    lambda lp: nft(lp, 0.25),
    (-0.093486, [0.15, 0.15, 0.15], [-0.026810, -0.067493, 0]),
  ),
  'M2PO': (m2po, (-0.249794, [0.221034, 0, 0.163746], [0, -0.134986, 0])),
  'RED-Weight': (
    lambda lp: mean(surrogates.reinforce(lp, A * np.exp(A))),
    (1.515728, [0.543656] * 3, [-0.060653, -0.060653, 0]),
  ),
  'OPMD of Kimi': (
    lambda lp: mean(surrogates.reinforce(lp, A) + 0.2 * penalties.k2(lp, OLD)),
    (0.425000, [0.196, 0.176, 0.208], [-0.08, -0.112, 0]),
  ),
  'OPMD-simple': (
    lambda lp: mean(surrogates.reinforce(lp, A) / 2),
    (0.205000, [0.1, 0.1, 0.1], [-0.05, -0.05, 0]),
  ),
  'AsymRE': (
    lambda lp: mean(surrogates.reinforce(lp, A) + 0.1 * penalties.nll(lp)),
    (0.508000, [0.22, 0.22, 0.22], [-0.08, -0.08, 0]),
  ),
  'k1': (
    lambda lp: mean(penalties.k1(lp, REFERENCE)),
    (0.010000, [-0.2, -0.2, -0.2], [-0.2, -0.2, 0]),
  ),
  'k2': (
    lambda lp: mean(penalties.k2(lp, REFERENCE)),
    (0.094250, [-0.01, -0.14, 0.08], [0.1, -0.04, 0]),
  ),
  'k3': (
    lambda lp: mean(penalties.k3(lp, REFERENCE)),
    (0.091418, [-0.009754, -0.100683, 0.098365], [0.129744, -0.036254, 0]),
  ),
  'detached ratio times k2': (
    lambda lp: mean(
      weights.truncated_importance(lp, OLD, cap=np.inf) * penalties.k2(lp, REFERENCE)
    ),
    (0.123223, [-0.011052, -0.255097, 0.065498], [0.060653, -0.053994, 0]),
  ),
  'live ratio times k3': (
    lambda lp: mean(penalties.importance_k3(ratio(lp), lp, REFERENCE)),
    (0.110046, [-0.011052, -0.255097, 0.065498], [0.060653, -0.053994, 0]),
  ),
  'Humanline PPO': (
    lambda lp: mean(
      surrogates.clipped(
        ratios.clamped(ratio(lp), MASK, low=-0.15, high=0.4), A, eps_low=0.9, eps_high=0.9
      )
    ),
    (-0.470484, [0.221034, 0, 0], [0, -0.134986, 0]),
  ),
  'DRO, per token': (
    lambda lp: mean(surrogates.reinforce(lp, A) + 0.1 * penalties.k2(lp, OLD)),
    (0.417500, [0.198, 0.188, 0.204], [-0.09, -0.106, 0]),
  ),
  'TBA': (
    lambda lp: tba(lp, log_partition.group_mean_detached),
    (1.380625, [1.175] * 3, [-1.175, -1.175, 0]),
  ),
  'VarGrad': (
    lambda lp: tba(lp, log_partition.group_mean),
    (1.380625, [1.175] * 3, [-1.175, -1.175, 0]),
  ),
  'P3O, separate clip': (
    lambda lp: p3o(lp, pointwise.paired_product_clip, eps=0.2),
    (0.112394, [0, 0, 0], [-1.012394, -1.012394, 0]),
  ),
  'P3O, joint clip, far': (
    lambda lp: p3o(lp, pointwise.paired_joint_clip, delta=0.2),
    (1.619831, [0, 0, 0], [0, 0, 0]),
  ),
  'P3O, joint clip, near': (
    lambda lp: p3o(lp, pointwise.paired_joint_clip, delta=0.8),
    (1.113634, [1.012394] * 3, [-1.012394, -1.012394, 0]),
  ),
}


@pytest.mark.parametrize('name', METHODS)
def test_value_and_gradient_are_those_of_the_paper(name, x64):
  loss, (value, *weight) = METHODS[name]
  got, gradient = jax.value_and_grad(loss)(jnp.asarray(LOGP))
  np.testing.assert_allclose(got, value, atol=1e-6)
  np.testing.assert_allclose(-gradient, weight, atol=1e-6)
