"""Weights of methods whose rewards come from networks that read hidden states."""

from polgrad.losses import reward_maps
from tests.policy_gradient.harness import ppo, ratio_of, sequence_mean, token_mean


def grpo(x):
  return sequence_mean(ppo(x, ratio_of(x), 0.8, 1.2), x['mask'])


ORACLES = {
  'rlfr': grpo,
  'rdd': grpo,
  'amago': lambda x: token_mean(x['advantages'], x['mask']),
}
FUNCTIONS = {
  reward_maps.with_bonus: (
    dict(coefficient=0.3),
    lambda a: a.rewards + 0.3 * a.bonus_scores.sum(axis=1),
  ),
}
