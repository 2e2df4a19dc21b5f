"""Rows with checked proposals are the rows without them, and their log-probs are those of the model."""

import doctest
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import build
from polgrad.options import from_text
from polgrad.overrides import apply
from polgrad.sampling import behavior_policies, make_sampler, speculation
from polgrad.sampling.speculation import Draft, FirstLayers, NGram
from polgrad.sampling.stopping import StopTable
from polgrad.types import Batch
from tests.models import tiny

POLICY, PARAMS, OTHER = tiny.policy(), tiny.params(), tiny.params(1)
STOPS = (3, 5, 8)
WIDTH, NEW, GROUP = 6, 9, 3
# Four prompts of 6, 4, 1 and 5 tokens.
TOKENS = tiny.rows(0, 4, WIDTH)
MASK = jnp.arange(WIDTH)[None] >= jnp.array([0, 2, 5, 1])[:, None]
IDS = jnp.array([7, 3, 11, 4])
# A row ends with a token twice, too.
TWICE = 22
FOLLOWING = np.zeros((3, tiny.VOCAB), np.uint8)
FOLLOWING[0, TWICE], FOLLOWING[1, TWICE], FOLLOWING[2] = 1, 2, 2
SETTINGS = dict(
  max_new_tokens=NEW, samples_per_prompt=GROUP, stop_ids=STOPS, pad_id=1, temperature=0.7,
  stop_table=StopTable(FOLLOWING, start=0, end=2),
)  # fmt: skip
LOCAL = tiny.policy(window=5, local_layers=(0,))


@functools.cache
def sampler(**settings):
  return make_sampler({'draft': POLICY}, default=LOCAL, **{**SETTINGS, **settings})


def draw(draft=OTHER, **settings) -> Batch:
  params = {'policy': PARAMS, 'draft': draft}
  return jax.device_get(sampler(**settings)(params, TOKENS, MASK, IDS, seed=0, step=0))


@functools.cache
def plain() -> Batch:
  return draw()


@pytest.mark.parametrize(
  'proposer, slots, draft',
  [(FirstLayers(tokens=2), 0, OTHER), (Draft(tokens=3), 4, OTHER), (Draft(tokens=3), 4, PARAMS)],
)
def test_rows_are_those_that_are_drawn_without_proposals(proposer, slots, draft):
  expected, out = plain(), draw(draft, slots=slots, speculate=proposer)
  for name in ('tokens', 'segment_ids', 'mask', 'finished', 'prompt_ids', 'group_ids'):
    np.testing.assert_array_equal(getattr(out, name), getattr(expected, name), err_msg=name)
  np.testing.assert_allclose(out.behavior_logp, expected.behavior_logp, atol=1e-5)
  lengths = out.mask.sum(axis=1)
  assert len(set(lengths.tolist())) > 2 and 0 < out.finished.sum() < 12
  assert lengths.sum() > out['passes'].sum()
  assert (-(-lengths // (proposer.tokens + 1)) <= out['passes']).all()


def test_greedy_rows_are_greedy_token_by_token():
  policy, params = tiny.policy(num_layers=1), tiny.params(num_layers=1)
  greedy = dict(behavior_policy=behavior_policies.greedy, max_new_tokens=24)
  sample = make_sampler({'policy': policy}, **greedy, speculate=NGram(tokens=4))
  out = jax.device_get(sample({'policy': params}, TOKENS, MASK, IDS, seed=0, step=0))
  logits = policy.unembed(params, policy.hidden(params, out.tokens, out.segment_ids))
  best = np.pad(np.argmax(logits, axis=-1), ((0, 0), (1, 0)))[:, :-1]
  assert out.mask.sum() == 96
  np.testing.assert_array_equal(out.tokens[out.mask], best[out.mask])
  np.testing.assert_array_equal(out.behavior_logp, 0)
  # Greedy rows of small models repeat themselves, and that is what is proposed.
  assert out['passes'].sum() < 0.9 * 96


def test_completions_have_their_exact_probabilities():
  """Completions of two tokens out of the best three of four, by a mixture; proposals are often wrong."""
  policy = tiny.policy(vocab_size=4, num_layers=1)
  one, other = (tiny.params(seed, vocab_size=4, num_layers=1) for seed in (0, 1))
  count, prompt = 3000, np.array([[1, 2, 1]])
  sample = make_sampler(
    {}, default=policy, max_new_tokens=2, samples_per_prompt=count, temperature=1.5, top_k=3,
    behavior_policy=behavior_policies.geometric_mixture, speculate=Draft(tokens=2, model='reference'),
  )  # fmt: skip
  params = {'policy': one, 'reference': other}
  out = jax.device_get(
    sample(params, prompt, np.ones_like(prompt, bool), np.arange(1), seed=3, step=0)
  )
  ends = np.array(list(itertools.product(range(4), repeat=2)))
  rows = np.concatenate([np.repeat(prompt, 16, axis=0), ends], axis=1)
  logits = [policy.unembed(p, policy.hidden(p, rows, rows * 0 + 1)) for p in (one, other)]
  mixed = np.mean(np.asarray(logits, np.float64), axis=0)[:, 2:4] / 1.5
  mixed = np.where(mixed > mixed.min(axis=-1, keepdims=True), mixed, -np.inf)
  logp = mixed - np.log(np.exp(mixed).sum(axis=-1, keepdims=True))
  logp = np.take_along_axis(logp, ends[..., None], axis=-1).sum(axis=(1, 2))
  expected = count * np.exp(logp)
  found = np.bincount(out.tokens[:, 3] * 4 + out.tokens[:, 4], minlength=16)
  some = expected > 0
  assert some.sum() == 9 and found[~some].sum() == 0 and abs(expected.sum() - count) < 1e-2
  gaps = (found - expected)[some] ** 2 / expected[some]
  assert gaps.sum() < 26.1  # 0.1% point, 8 degrees of freedom
  assert 0.1 < np.mean(out['passes'] == 1) < 0.95


def test_the_examples_are_true():
  assert not doctest.testmod(speculation).failed


def test_a_row_is_continued_as_after_the_latest_of_its_longest_matches():
  cases = [
    ([-1, 4, 7, 1, 2, 9, 1, 2], [9, 1, 2, 9]),  # (1, 2) was before
    ([1, 2, 8, 3, 2, 9, 1, 2], [8, 3, 2, 9]),  # two tokens match more than one does
    ([8, 2, 7, 3, 2, 9, 1, 2], [9, 1, 2, 9]),  # the latest match of one token
    ([-1, -1, -1, -1, -1, -1, -1, 5], [5, 5, 5, 5]),  # no match, and padding is none
    ([9, 8, 7, 1, 3, 4, 5, 6], [6, 6, 6, 6]),
  ]
  # What lies behind the last token does not count.
  rows = np.array([[*text, 1, 2, 3] for text, _ in cases])
  out = speculation.continued(rows, np.full(len(rows), 7), tokens=4, longest=3)
  assert out.tolist() == [expected for _, expected in cases]


def changed(**changes):
  config = from_text('method=grpo,task=addition,model=tiny,smoke,warm_start=0')
  changes = {f'config.phases.train.{k}': v for k, v in changes.items()}
  return build.build(apply(config, changes, build.TABLE))


DRAFT = {'collect.speculate.name': 'Draft'}
OTHER = {'anchors.draft.name': 'fixed', 'frozen.draft.name': 'decoder'}
SIZES = {'vocab_size': '14', 'num_layers': '1', 'num_heads': '2', 'num_kv_heads': '2'}
OTHER |= {f'frozen.draft.{name}': size for name, size in SIZES.items()}


@pytest.mark.parametrize(
  'changes, message',
  [
    (DRAFT, r"train.anchors: collect.speculate needs an anchor 'draft'; there are \['reference'\]"),
    (
      {**DRAFT, 'anchors.draft.name': 'fixed'},
      "collect.speculate.model: 'draft' is a copy of the policy.* smaller model by .*frozen.draft, or",
    ),
    (
      {**DRAFT, 'collect.speculate.model': 'policy'},
      "collect.speculate.model: 'policy' is the policy, so it proposes no faster",
    ),
    (
      {**DRAFT, **OTHER, 'frozen.draft.vocab_size': '77'},
      'frozen.draft: its vocabulary has 77 tokens, that of config.model 14',
    ),
    (
      {**DRAFT, **OTHER, 'frozen.draft.max_length': '6'},
      'frozen.draft: rows of 11 tokens, but its max_length is 6',
    ),
    (
      {'collect.speculate.name': 'FirstLayers', 'collect.speculate.layers': '2'},
      r'config.phases.train.collect: speculate.layers=2: a part of the 2 layers .* has 1 to 1',
    ),
    (
      {'collect.speculate.name': 'FirstLayers', 'collect.speculate.model': 'teacher'},
      r"speculate.model: the behavior policy does not read 'teacher'; valid: \['policy'\]",
    ),
    (
      {'collect.speculate.name': 'NGram', 'collect.environment.name': 'Guess'},
      'speculate proposes tokens of completions of one turn; leave out the environment',
    ),
    (
      {'collect.speculate.name': 'NGram', 'collect.in_flight': '4'},
      r"in_flight=4: .* so \['speculate'\] cannot be set",
    ),
    ({'collect.speculate.name': 'Ngram'}, 'did you mean'),
  ],
)
def test_proposers_that_cannot_propose_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    changed(**changes)
