"""GRACE: the reward of rows is that of the policy's embeddings of them and of related texts."""

import jax
import numpy as np
import pytest

from polgrad import collect, methods, presets, tasks
from polgrad.collect import beginnings
from polgrad.collect.contrasted import ContrastedSteps
from polgrad.compose import compose
from polgrad.data import batching, sources, tokenizers
from polgrad.losses import embedding_rewards
from polgrad.registry import bind, part
from polgrad.rewards.scoring import Scores
from tests.exploration_test import ARMS, BANDITS, VOCABULARY, bandits, context_of, state_of

SIZES = dict(prompts=3, samples_per_prompt=4, prompt_length=1, max_new_tokens=3)
RECORDS = [
  {'id': i, 'prompt': str(i), 'query': str(i + 10), 'negatives': [str(i + 20), str(i + 30)]}
  for i in range(SIZES['prompts'])
]


def made(partner_samples, negatives='own') -> tuple[collect.Context, ContrastedSteps]:
  """A collector for bandits whose states are one-hot; the arm 0 is the stop token."""
  score = lambda texts, *_: Scores(
    np.arange(len(texts), dtype=float), {}, np.arange(len(texts)) != 2, {}, []
  )
  context = context_of(bandits(), lambda text: [len(ARMS) + int(text)], score=score)
  context = context._replace(tokenizer=context.tokenizer._replace(stop_ids=(0,)))
  collector = bind(
    part(
      collect.Contrasted,
      **SIZES,
      negatives=2,
      partner_samples=partner_samples,
      unfinished_reward=-7.0,
      contrast=part(embedding_rewards.contrastive, negatives=negatives),
    ),
    collect.TABLE,
  )
  return context, collector.make(context).__self__


def embedding(tokens, segment_ids):
  """The mean one-hot state of a row, of length 1, in float64."""
  counts = np.bincount(tokens[segment_ids > 0], minlength=VOCABULARY).astype(float)
  return counts / np.linalg.norm(counts)


@pytest.mark.parametrize('partner_samples', [1, 0])
def test_the_reward_is_that_of_the_embeddings_of_four_rollouts(partner_samples, monkeypatch):
  context, steps = made(partner_samples)
  state = state_of({'table': np.tile(ARMS[None], (BANDITS, 1))})
  with jax.set_mesh(context.mesh):
    got = steps.collect(state, lambda count: RECORDS[:count], 5)
    others = steps.settings.related(RECORDS)
    beside = steps.draw_others(state, others, 5).batch
    monkeypatch.setattr(batching, 'header', lambda record, tokenizer: 1)
    headless = steps._embeddings(state, beside, others)
  batch, each = got.batch, partner_samples or SIZES['samples_per_prompt']
  own = [embedding(*row) for row in zip(batch.tokens, batch.segment_ids)]
  rows = [embedding(*row) for row in zip(beside.tokens, beside.segment_ids)]
  # Text by text (query, negatives), each with the rows of its prompts.
  other = np.reshape(rows, (3, SIZES['prompts'], each, -1))
  assert {*batch.tokens[:, 0]} == {len(ARMS) + i for i in range(3)}
  assert beside.tokens[:: 3 * each, 0].tolist() == [len(ARMS) + i for i in (10, 20, 30)]
  size, seen = SIZES['samples_per_prompt'], set()
  for i, reward in enumerate(batch.rewards):
    group, member = divmod(i, size)
    query = other[0, group, member % each]
    far = max(query @ other[n, group, member % each] for n in (1, 2))
    inside = np.mean([own[i] @ own[j] for j in range(group * size, (group + 1) * size) if j != i])
    across = np.mean(
      [max(query @ own[j] for j in range(g * size, (g + 1) * size)) for g in range(3) if g != group]
    )
    want = i + (query @ own[i] - far + 0.2 * inside - 0.2 * across) / 0.1
    want = 0 if i == 2 else want if batch.finished[i] else -7
    np.testing.assert_allclose(reward, want, rtol=1e-4)
    seen.add(bool(batch.finished[i]))
  assert seen == {True, False}  # both kinds of rows are there
  np.testing.assert_allclose(got.sampled.rewards, batch.rewards)
  assert 'contrast' in got.terms and 'contrast' not in batch
  # What a template writes before a text is left out.
  want = [embedding(*row) for row in zip(beside.tokens[:, 1:], beside.segment_ids[:, 1:])]
  np.testing.assert_allclose(headless, want, rtol=1e-5)


def test_what_comes_before_the_text_is_in_no_embedding():
  tokenizer = tokenizers.byte()
  turns = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'one'}]
  record = {'id': 0, 'messages': turns}
  assert batching.header(record, tokenizer) == 1 + len('system: Be brief.\nuser: ')  # 1: bos
  assert batching.header({'id': 0, 'prompt': 'one'}, tokenizer) == 1
  asked = batching.asking(record, 'two')
  assert asked['messages'] == [turns[0], {'role': 'user', 'content': 'two'}]


def test_records_without_related_texts_and_settings_that_do_not_fit_are_refused():
  collector = collect.Contrasted(**SIZES | {'prompt_length': 9}, negatives=2)
  lay_out = lambda record: collector.lay_out([record], tokenizer=tokenizers.byte())
  whole = {'id': 3, 'prompt': 'a', 'query': 'b', 'negatives': ['c', 'd']}
  assert lay_out(whole).tokens.shape == (1, 9)
  for change, said in (
    ({'query': None}, 'record 3: query must be a text'),
    ({'negatives': ['c']}, 'record 3: negatives must be a list of 2 or more'),
    ({'negatives': 'cd'}, 'record 3: negatives must be'),
    ({'query': 'longer than it may be'}, '22 tokens, longer than'),
  ):
    with pytest.raises(ValueError, match=said):
      lay_out(whole | change)
  for wrong in (
    {'max_resamples': 1},
    {'baseline_samples': 2},
    {'partner_samples': 3},
    {'beginning': beginnings.uniform},
  ):
    with pytest.raises(ValueError, match=next(iter(wrong))):
      collect.Contrasted(**SIZES | wrong)


def test_sums_of_the_task_have_partners_of_the_same_and_of_other_results():
  result = lambda text: sum(map(int, text.rstrip('=').split('+')))
  source = sources.same_sums(source=sources.arithmetic(digits=1), negatives=3)
  for record in (source[i] for i in range(len(source))):
    want = int(record['answer'])
    assert result(record['query']) == want and len(record['negatives']) == 3
    assert all(result(text) != want for text in record['negatives'])
  task = tasks.same_sums()
  config = compose(methods.grace, task, presets.tiny(alphabet=task.alphabet), smoke=True)
  assert config.phases.train.reward.to_dict() == {}
  with pytest.raises(ValueError, match='the task has no verifier'):
    compose(methods.grpo, task, presets.tiny(alphabet=task.alphabet))
