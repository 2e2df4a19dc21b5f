"""What the best-known policy gradients follow in expectation, exactly: unbiased, or biased as stated.

Credit and objective of a method get every rollout that a
tiny policy can produce: N prompts, G samples each, with their probabilities. The sum is the exact
expected gradient, and it is compared with the gradient of a function that is written here from the
theory."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import credit
from polgrad.credit import Estimator
from polgrad.losses import advantages
from polgrad.objectives import Objective
from polgrad.registry import part
from polgrad.tabular import enumerable
from polgrad.types import Batch, Outputs
from tests.policy_gradient import harness
from tests.runs import method_of


class Estimate(NamedTuple):
  """Credit and objective of a method, as functions of arrays."""

  credit: Estimator
  objective: Objective


class Case(NamedTuple):
  """A policy, which all prompts share, and what each prompt rewards.

  `S` sequences of length up to H, `P` prefixes, `N` prompts.
  """

  policy: enumerable.Policy
  rewards: np.ndarray  # [N, S]
  group: int  # samples a prompt
  params: dict  # 'logits' [P, V] and 'values' [N, P], which are wrong on purpose
  reference: np.ndarray  # [P, V], logits


def make_case(policy: enumerable.Policy, rewards, *, group: int) -> Case:
  rng = np.random.default_rng(0)
  shape = jax.eval_shape(policy.init, jax.random.key(0)).shape
  params = {
    'logits': 0.7 * rng.normal(size=shape),
    'values': rng.normal(size=(len(rewards), shape[0])),
  }
  reference = params['logits'] + 0.5 * rng.normal(size=shape)
  return Case(policy, np.array(rewards, np.float64), group, params, reference)


BANDIT = enumerable.table(3, 1)
BITS = enumerable.table(2, 2)  # '00', '01', '10', '11'
EQUAL = enumerable.table(3, 2)  # nine sequences of two tokens
STOPPING = enumerable.table(3, 2, stop=0)  # '0', '10', '11', '12', '20', '21', '22'
COUNTING = enumerable.table(2, 3, stop=0)  # '0', '10', '110', '111'
CASES = {
  'equal_lengths': make_case(EQUAL, [[1, 0, 0, 0, 1, 1, 0, 0, 0]], group=3),
  'two_prompts': make_case(BANDIT, [[1, 0, 0], [0, 1, 0]], group=4),
  'stop_token': make_case(STOPPING, [[1, 0, 1, 0, 0, 1, 0]], group=3),
  'stop_token_two_prompts': make_case(COUNTING, [[0, 1, 0, 1], [1, 0, 0, 0]], group=3),
}
EACH_CASE = pytest.mark.parametrize('case', CASES.values(), ids=CASES)


# The machine: rollouts, their probabilities, and the experiment's own credit and objective on them.


def live(case: Case, params) -> dict:
  """What a model says of all sequences: logp, entropy [S, H] and values [N, S, H]."""
  log_p = jax.nn.log_softmax(jnp.asarray(params['logits']))
  prefixes = case.policy.prefixes
  return {
    'logp': enumerable.logp(case.policy, jnp.asarray(params['logits'])),
    'entropy': -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)[prefixes],
    'values': jnp.asarray(params['values'])[:, prefixes],
  }


def rollouts(case: Case, params) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """All rollouts as indices of sequences [R, B], the prompts of the rows [B], and probabilities [R]."""
  prompts = np.repeat(np.arange(len(case.rewards)), case.group)
  count = len(case.policy.tokens)
  samples = np.indices((count,) * len(prompts)).reshape(len(prompts), -1).T
  row_logp = np.asarray(live(case, params)['logp']).sum(axis=1)
  return samples, prompts, np.exp(row_logp[samples].sum(axis=1))


def load(name: str, **credit_knobs) -> Estimate:
  method = method_of(name)
  for knob, value in credit_knobs.items():
    with method.credit.unlocked():
      method.credit[knob] = value
  return Estimate(*method.bound())


def loss(case: Case, method: Estimate, params, sample, prompts, data, state):
  """The loss of one rollout: what `collect.Rollouts` and the learner compute, without the sampler."""
  mask = jnp.asarray(case.policy.mask)[sample]
  batch = Batch(
    tokens=jnp.asarray(case.policy.tokens)[sample],
    segment_ids=mask.astype(jnp.int32),
    mask=mask,
    behavior_logp=data['logp'][sample],
    group_ids=jnp.asarray(prompts),
    rewards=jnp.asarray(case.rewards)[prompts, sample],
    valid=jnp.ones(len(prompts), bool),
    proximal_logp=data['logp'][sample],
    reference_logp=data['reference_logp'][sample],
    old_values=data['values'][prompts, sample],
  )
  batch, _ = credit.assign(method.credit, batch, state)
  now = live(case, params)
  outputs = Outputs(
    logp=now['logp'][sample], entropy=now['entropy'][sample], values=now['values'][prompts, sample]
  )
  terms = harness.terms_of(method.objective, outputs, batch, step=0)
  return sum(term.value() for term in terms.values())


def descent(case: Case, method: Estimate, *, state=None, sampler=None):
  """-E[grad loss], exactly, over all rollouts of the sampler (by default the policy itself)."""
  state = method.credit.init() if state is None else state
  sampler = case.params if sampler is None else sampler
  samples, prompts, probabilities = rollouts(case, sampler)
  reference = enumerable.logp(case.policy, jnp.asarray(case.reference))
  data = live(case, sampler) | {'reference_logp': reference}

  def mean(params):
    one = lambda sample: loss(case, method, params, sample, prompts, data, state)
    return -jnp.sum(probabilities * jax.vmap(one)(jnp.asarray(samples)))

  return jax.jit(jax.grad(mean))(case.params)


# The theory: functions of the parameters whose gradient the estimators follow. NumPy arrays in them
# are taken at the sampling parameters and carry no gradient.


def mean_return(case: Case, params):
  """E[R], averaged over prompts."""
  rewards = jnp.asarray(case.rewards.mean(axis=0))
  return enumerable.objective(case.policy, jnp.asarray(params['logits']), rewards)


def score(case: Case, params, weights: np.ndarray):
  """A function with the gradient E[sum_t weights[y, t] grad log pi(y_t)]; weights [S, H]."""
  return jnp.sum(probabilities_of(case)[:, None] * weights * live(case, params)['logp'])


def probabilities_of(case: Case) -> np.ndarray:
  return np.exp(np.asarray(live(case, case.params)['logp']).sum(axis=1))


def lengths_of(case: Case) -> np.ndarray:
  return case.policy.mask.sum(axis=1)


def success_rates(case: Case) -> np.ndarray:
  """p of every prompt [N], for rewards of 0 and 1."""
  assert set(case.rewards.ravel()) == {0, 1}
  return case.rewards @ probabilities_of(case)


def standardized_scale(p: float, size: int, *, inside: float = 0.0, outside: float = 1e-6) -> float:
  """c(p) = E[q (1 - q) / std] of q = k / size, k binomial, with std = sqrt(var + inside) + outside.

  The variance has ddof = 1, so c(p) is sqrt((G - 1) / G) times that of the population's.
  """
  k = np.arange(size + 1)
  q = k / size
  binomial = np.array([math.comb(size, i) for i in k]) * p**k * (1 - p) ** (size - k)
  std = np.sqrt(q * (1 - q) * size / (size - 1) + inside) + outside
  return np.sum(binomial * q * (1 - q) / std)


def standardized_advantage(case: Case) -> np.ndarray:
  """What a sequence's advantage is in expectation over the rest of its group, mean of prompts [S].

  c(p) (R - p) / (p (1 - p)): right rows get c(p) / p, wrong ones -c(p) / (1 - p).
  """
  per_prompt = [
    standardized_scale(p, case.group) * (rewards - p) / (p * (1 - p))
    for p, rewards in zip(success_rates(case), case.rewards)
  ]
  return np.mean(per_prompt, axis=0)


def prefix_mean(case: Case, per_prefix):
  """E[sum_t per_prefix[y_<t]], the distribution of prefixes carrying no gradient; [P] -> []."""
  reach = np.zeros(len(case.reference))
  rows, _ = np.nonzero(case.policy.mask)
  np.add.at(reach, case.policy.prefixes[case.policy.mask], probabilities_of(case)[rows])
  return jnp.sum(reach * per_prefix)


def exact_values(case: Case) -> np.ndarray:
  """E[R | prefix] for every prompt: [N, P]."""
  reach, total = np.zeros(len(case.reference)), np.zeros(case.params['values'].shape)
  rows, _ = np.nonzero(case.policy.mask)
  prefixes, p = case.policy.prefixes[case.policy.mask], probabilities_of(case)
  np.add.at(reach, prefixes, p[rows])
  np.add.at(total.T, prefixes, (p * case.rewards)[:, rows].T)
  return total / reach


def reinforce(case: Case, params):
  """Unbiased: E[R]."""
  return mean_return(case, params)


def rloo(case: Case, params):
  """Unbiased for the regularised return: E[R] - 0.03 KL(pi, reference), of whole sequences."""
  reference = enumerable.logp(case.policy, jnp.asarray(case.reference))
  log_ratio = jnp.sum(live(case, params)['logp'] - reference, axis=1)
  kl = enumerable.objective(case.policy, jnp.asarray(params['logits']), log_ratio)
  return mean_return(case, params) - 0.03 * kl


def dr_grpo(case: Case, params):
  """The true direction, (G - 1) / G as long, over the constant token budget of 5."""
  return (case.group - 1) / case.group / 5 * mean_return(case, params)


def gspo(case: Case, params):
  """c(p) / (p (1 - p)) times grad p a prompt, and each sequence's share divided by its length."""
  weights = standardized_advantage(case) / lengths_of(case)
  return score(case, params, weights[:, None])


def grpo(case: Case, params):
  """GSPO's, and -0.04 (1 - reference / pi) grad log pi for every token, over the length too."""
  now, reference = live(case, case.params)['logp'], enumerable.logp(case.policy, case.reference)
  kl = -np.expm1(np.asarray(reference - now)) / lengths_of(case)[:, None]
  return gspo(case, params) - 0.04 * score(case, params, kl)


def dapo(case: Case, params):
  """E[sum_i A_i grad log pi(y_i) / sum_i length_i]: a mean of ratios, no ratio of means."""
  samples, prompts, probability = rollouts(case, case.params)
  right = case.rewards[prompts, samples].reshape(len(samples), -1, case.group)
  q = right.mean(axis=-1, keepdims=True)
  std = np.sqrt(q * (1 - q) * case.group / (case.group - 1))
  advantage = ((right - q) / (std + 1e-6)).reshape(samples.shape)
  share = (probability / lengths_of(case)[samples].sum(axis=1))[:, None]
  return jnp.sum(share * advantage * live(case, params)['logp'].sum(axis=1)[samples])


def ppo(case: Case, params):
  """E[(sum_t A_t grad log pi - mean A sum_t grad log pi) / (std A * tokens)] with A from GAE, and
  0.001 grad entropy - 0.5 (V - return) grad V of every token, over the tokens of the rollout."""
  samples, prompts, probability = rollouts(case, case.params)
  mask, values = case.policy.mask[samples], case.params['values']
  values = np.where(mask, values[prompts[:, None], case.policy.prefixes[samples]], 0)
  last = np.arange(mask.shape[-1]) == lengths_of(case)[samples][..., None] - 1
  rewards = last * case.rewards[prompts, samples][..., None]
  gae = np.zeros((*mask.shape[:-1], mask.shape[-1] + 1))
  after = np.concatenate([values[..., 1:], np.zeros_like(values[..., :1])], axis=-1)
  for t in reversed(range(mask.shape[-1])):
    error = rewards[..., t] + after[..., t] - values[..., t]
    gae[..., t] = mask[..., t] * (error + 0.95 * gae[..., t + 1])
  gae = gae[..., :-1]
  tokens = mask.sum(axis=(1, 2), keepdims=True)
  centered = mask * (gae - gae.sum(axis=(1, 2), keepdims=True) / tokens)
  variance = np.square(centered).sum(axis=(1, 2), keepdims=True) / (tokens - 1)
  now = live(case, params)
  ascent = centered / np.sqrt(variance + 1e-8) * now['logp'][samples]
  ascent += 0.001 * mask * now['entropy'][samples]
  ascent += 0.5 * mask * gae * now['values'][prompts, samples]  # return - V is the advantage
  return jnp.sum(probability[:, None, None] / tokens * ascent)


EXPECTED = {f.__name__: f for f in (reinforce, rloo, dr_grpo, grpo, dapo, gspo, ppo)}


def assert_follows(got, case: Case, function):
  expected = jax.grad(lambda params: function(case, params))(case.params)
  assert np.max(np.abs(expected['logits'])) > 1e-3
  for name in expected:
    np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-11)


def cosine(a, b) -> float:
  return np.vdot(a, b) / np.sqrt(np.vdot(a, a) * np.vdot(b, b))


@EACH_CASE
@pytest.mark.parametrize('name', EXPECTED)
def test_the_expected_gradient_is_the_stated_one(name, case, x64):
  assert_follows(descent(case, load(name)), case, EXPECTED[name])


# Theorems: what these functions are in the cases that the papers speak about.

TWO_TOKENS = make_case(BITS, [[1, 0, 0, 1], [0, 1, 0, 0]], group=2)


def with_exact_values(case: Case) -> Case:
  return case._replace(params=case.params | {'values': exact_values(case)})


def token_entropy(case: Case, params):
  log_p = jax.nn.log_softmax(params['logits'])
  return prefix_mean(case, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1))


def token_forward_kl(case: Case, params):
  """KL(reference || pi) of the next token, at prefixes that pi visits."""
  log_p, reference = (jax.nn.log_softmax(x) for x in (params['logits'], case.reference))
  return prefix_mean(case, jnp.sum(jnp.exp(reference) * (reference - log_p), axis=-1))


@pytest.mark.parametrize('name', ['reinforce', 'rloo', 'dr_grpo'])
@pytest.mark.parametrize('policy', [BITS, COUNTING])
def test_estimators_linear_in_the_reward_follow_rewards_of_any_value(name, policy, x64):
  case = make_case(policy, [[0.3, -1, 2, 0.7], [1.5, -0.4, 0, 1]], group=2)
  assert_follows(descent(case, load(name)), case, EXPECTED[name])


@pytest.mark.parametrize('baseline', [-3.0, 0.5, 40.0])
def test_reinforce_is_unbiased_whatever_baseline_it_carries(baseline, x64):
  state = {'total': jnp.asarray(2 * baseline), 'weight': jnp.asarray(2.0)}
  case = CASES['stop_token']
  assert_follows(descent(case, load('reinforce'), state=state), case, mean_return)


@pytest.mark.parametrize('name', ['gspo', 'dapo'])
@pytest.mark.parametrize('case', ['equal_lengths', 'two_prompts'])
def test_at_equal_lengths_standardizing_rescales_each_prompts_gradient(name, case, x64):
  """c(p) / (p (1 - p)) / H grad p, mean over prompts: rare success and rare failure weigh more."""
  case = CASES[case]
  p = success_rates(case)
  scale = np.array([standardized_scale(x, case.group) for x in p]) / (p * (1 - p))
  rescaled = case._replace(rewards=scale[:, None] * case.rewards / case.policy.mask.shape[1])
  assert_follows(descent(case, load(name)), rescaled, mean_return)


@pytest.mark.parametrize('size', [2, 3])
def test_in_groups_of_two_or_three_standardizing_is_a_constant(size, x64):
  """With rewards of 0 and 1 a mixed group has the std sqrt(1 / G), so c(p) / (p (1 - p)) is
  (G - 1) / sqrt(G) for all p, and prompts keep their weights."""
  case = CASES['two_prompts']._replace(group=size)
  scale = (size - 1) / size / (np.sqrt(1 / size) + 1e-6)
  got = descent(case, load('gspo'))
  assert_follows(got, case, lambda case, params: scale * mean_return(case, params))


def test_grpo_adds_the_forward_kl_of_tokens_exactly_at_equal_lengths_only(x64):
  """GRPO is GSPO - 0.04 / H grad KL(reference || pi); dividing by sampled lengths turns it."""
  kl, forward = {}, {}
  for name in ('equal_lengths', 'stop_token'):
    case = CASES[name]
    kl[name] = descent(case, load('gspo'))['logits'] - descent(case, load('grpo'))['logits']
    forward[name] = jax.grad(lambda params, c=case: token_forward_kl(c, params))(case.params)
    forward[name] = forward[name]['logits']
  np.testing.assert_allclose(kl['equal_lengths'], 0.04 / 2 * forward['equal_lengths'], atol=1e-12)
  np.testing.assert_allclose(cosine(kl['stop_token'], forward['stop_token']), 0.96048, atol=1e-5)


@pytest.mark.parametrize(
  ('name', 'equal_lengths', 'stop_token'),
  [('gspo', 1, 0.96964), ('dapo', 1, 0.99778), ('ppo', 0.98949, 0.98915)],
)
def test_what_normalizers_cost_in_direction(name, equal_lengths, stop_token, x64):
  """The cosine with the gradient of E[R]: for one prompt, lengths turn it where they differ, and
  whitening always. The critic is exact, so PPO has no other bias but its entropy term."""
  for case, expected in (('equal_lengths', equal_lengths), ('stop_token', stop_token)):
    case = with_exact_values(CASES[case])
    true = jax.grad(lambda params, c=case: mean_return(c, params))(case.params)
    got = cosine(descent(case, load(name))['logits'], true['logits'])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('trace', [0.0, 0.95, 1.0])
def test_ppo_without_whitening_is_unbiased_at_any_trace_once_the_critic_is_exact(trace, x64):
  """E[R] / H + 0.001 / H entropy of tokens, and the critic is at rest."""
  case = with_exact_values(TWO_TOKENS)
  method = load('ppo', normalizer=part(advantages.identity), trace=trace)

  def follows(case, params):
    return (mean_return(case, params) + 0.001 * token_entropy(case, params)) / 2

  assert_follows(descent(case, method), case, follows)


@pytest.mark.parametrize('trace', [0.0, 0.95, 1.0])
def test_a_wrong_critic_biases_ppo_by_one_minus_trace_times_its_error_at_the_next_prefix(
  trace, x64
):
  """The critic itself follows 0.5 (target - V), target = trace V* + (1 - trace) E[V(next prefix)]."""
  case = TWO_TOKENS
  method = load('ppo', normalizer=part(advantages.identity), trace=trace)
  values, exact = case.params['values'], exact_values(case)
  first, second = case.policy.prefixes[0, 0], case.policy.prefixes[:, 1]
  error = np.stack([(values - exact)[:, second].mean(axis=0), np.zeros(len(second))], axis=1)
  target = exact.copy()
  target[:, first] *= trace
  target[:, first] += (1 - trace) * values[:, second] @ probabilities_of(case)

  def follows(case, params):
    policy = mean_return(case, params) + score(case, params, (1 - trace) * error)
    critic = prefix_mean(case, jnp.mean((target - values) * params['values'], axis=0))
    return (policy + 0.001 * token_entropy(case, params) + 0.5 * critic) / 2

  assert_follows(descent(case, method), case, follows)


def test_on_one_token_whitened_ppo_standardizes_the_batch_as_grpo_does_a_group(x64):
  """c(p) / (p (1 - p)) grad p with G the whole batch: whitening drops the exact baseline again."""
  case = with_exact_values(make_case(BANDIT, [[0, 1, 0]], group=4))
  (p,) = success_rates(case)
  scale = standardized_scale(p, 4, inside=1e-8, outside=0.0) / (p * (1 - p))

  def follows(case, params):
    return scale * mean_return(case, params) + 0.001 * token_entropy(case, params)

  assert_follows(descent(case, load('ppo')), case, follows)


def test_the_step_of_whitened_ppo_does_not_know_the_scale_of_the_reward(x64):
  """So no constant relates it to the gradient of the return, which grows with the reward."""
  case = CASES['stop_token']
  params = case.params | {'values': 10 * case.params['values']}
  method = load('ppo', normalizer=part(advantages.whiten, eps=1e-30))
  scaled = descent(case._replace(rewards=10 * case.rewards, params=params), method)
  np.testing.assert_allclose(scaled['logits'], descent(case, method)['logits'], atol=1e-12)


@pytest.mark.parametrize(('shift', 'inside'), [(0.1, True), (1.0, False)])
def test_on_stale_rollouts_the_clipped_ratio_is_token_importance_weighting_inside_the_bounds(
  shift, inside, x64
):
  """(G - 1) / G / 5 E_sampler[(R - E_sampler R) sum_t r_t grad log pi(y_t)], for Dr. GRPO."""
  case = CASES['stop_token']
  noise = np.random.default_rng(1).normal(size=case.reference.shape)
  sampler = case.params | {'logits': case.params['logits'] + shift * noise}
  stale = case._replace(params=sampler)
  ratio = np.exp(live(case, case.params)['logp'] - live(case, sampler)['logp'])
  assert (np.max(np.abs(ratio - 1)) < 0.2) == inside
  centered = case.rewards[0] - success_rates(stale)
  weights = 2 / 3 / 5 * centered[:, None] * ratio
  got = descent(case, load('dr_grpo'), sampler=sampler)['logits']
  expected = jax.grad(lambda params: score(stale, params, weights))(case.params)['logits']
  assert (np.max(np.abs(got - expected)) < 1e-12) == inside
