"""Evaluation: unbiased rates, votes, and verifiers that fail without a trace in either."""

import itertools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import build, evaluate, phases
from polgrad.build import HeldOut
from polgrad.collect import Drawn
from polgrad.data import sources, tokenizers
from polgrad.environments import Guess
from polgrad.environments.episodes import Episode
from polgrad.evaluate import majority_at_k, make_evaluator, mark, pass_at_k
from polgrad.learner import forward
from polgrad.options import from_text
from polgrad.rewards import verifiers
from polgrad.rewards.worker import Failure
from polgrad.types import Batch
from tests.runs import dpo

NAN = math.nan


def brute_force(marks, k):
  """Mean over problems of the share of k-subsets of verified samples that hold a right one."""
  shares = []
  for row in marks:
    draws = list(itertools.combinations([m for m in row if not np.isnan(m)], k))
    if draws:
      shares.append(np.mean([max(draw) for draw in draws]))
  return np.mean(shares)


@pytest.mark.parametrize('k', [1, 2, 3, 6])
def test_pass_at_k_is_the_mean_over_all_subsets(k):
  marks = np.array(list(itertools.product([0.0, 1.0], repeat=6)))
  assert pass_at_k(marks, k) == pytest.approx(brute_force(marks, k), abs=1e-12)


@pytest.mark.parametrize('k', [1, 2, 3])
def test_pass_at_k_with_failed_verifiers_is_the_mean_over_verified_subsets(k):
  marks = np.array(list(itertools.product([0.0, 1.0, NAN], repeat=4)))
  assert pass_at_k(marks, k) == pytest.approx(brute_force(marks, k), abs=1e-12)


def test_pass_at_k_of_many_samples_is_exact():
  marks = np.zeros((1, 2000))
  marks[0, :3] = 1
  expected = 1 - np.prod([1 - 1000 / (2000 - i) for i in range(3)])
  assert pass_at_k(marks, 1000) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('k', [0, 4])
def test_pass_at_k_needs_as_many_samples(k):
  with pytest.raises(ValueError, match=rf'pass@{k} needs k between 1 and the 3 samples'):
    pass_at_k(np.ones((2, 3)), k)


def test_failed_verifier_is_neither_right_nor_wrong():
  scores = np.array([[1.0, 0.0, NAN, 0.5]])
  np.testing.assert_array_equal(mark(scores, 0.5), [[1, 0, NAN, 1]])
  assert pass_at_k(mark(scores, 0.5), 1) == 2 / 3
  assert pass_at_k(mark(scores, 0.5), 3) == 1
  with np.errstate(all='raise'):
    assert math.isnan(pass_at_k(np.full((2, 3), NAN), 1))
    assert math.isnan(majority_at_k([['a', 'b', 'b']], np.full((1, 3), NAN)))


@pytest.mark.parametrize(
  ('votes', 'marks', 'share'),
  [
    (['7', '8', '8'], [1, 0, 0], 0.0),
    (['8', '7', '7'], [0, 1, 1], 1.0),
    (['7', '8', '8', '7'], [1, 0, 0, 1], 1.0),  # a draw goes to the earliest
    (['8', '7', '7', '8'], [0, 1, 1, 0], 0.0),
    (['7', '7', '8'], [0, 1, 1], 0.0),  # equal answers, judged as the first was
    (['8', '8', '7'], [NAN, NAN, 1], 1.0),  # only verified samples vote
    (['7', '7', '8'], [NAN, 1, 0], 1.0),
  ],
)
def test_majority_at_k_is_the_verdict_on_the_most_frequent_answer(votes, marks, share):
  assert majority_at_k([votes], np.array([marks], float)) == share


def test_majority_at_k_averages_over_problems_that_have_votes():
  marks = np.array([[1, 1], [0, 0], [1, 0], [NAN, NAN]])
  assert majority_at_k([['a', 'a'], ['a', 'a'], ['a', 'b'], ['a', 'a']], marks) == 2 / 3


@pytest.mark.parametrize(
  ('text', 'pattern', 'expected'),
  [
    (' 42\n', '(?s)(.*)', '42'),
    ('so\n42', '(?s)(.*)', 'so\n42'),
    ('x=1, x=2', r'x=(\d)', '2'),
    ('no match ', r'x=(\d)', 'no match'),
    ('', '(?s)(.*)', ''),
    ('x=1, y=2', r'x=(\d)|y=(\d)', 'x=1, y=2'),
    ('y=2, x=1', r'x=(\d)|y=(\d)', '1'),
    ('x=1', r'\d', '1'),
  ],
)
def test_answer_is_the_last_match_without_space_around_it(text, pattern, expected):
  assert sources.last_match(text, pattern) == expected


TOKENIZER = tokenizers.byte()
WIDTH = 3


def rollout(texts, prompts):
  """What a sampler that wrote these texts would return."""
  group = len(texts) // len(prompts)
  tokens = np.full((len(texts), prompts.shape[1] + WIDTH), TOKENIZER.pad_id, np.int32)
  tokens[:, : prompts.shape[1]] = np.repeat(prompts, group, axis=0)
  mask = np.zeros(tokens.shape, bool)
  for row, text in enumerate(texts):
    ids = [*TOKENIZER.encode(text), TOKENIZER.stop_ids[0]]
    stop = prompts.shape[1] + len(ids)
    tokens[row, prompts.shape[1] : stop] = ids
    mask[row, prompts.shape[1] : stop] = True
  rows = np.zeros(len(texts), np.int32)
  return Batch(
    tokens=tokens,
    segment_ids=mask.astype(np.int32),
    mask=mask,
    behavior_logp=np.zeros(tokens.shape, np.float32),
    finished=rows == 0,
    prompt_ids=rows,
    group_ids=rows,
  )


def moody(completion, record):
  """Right or wrong, but it chokes on '?'."""
  if '?' in completion:
    raise RuntimeError('unreadable')
  return verifiers.exact_match(completion, record)


@pytest.fixture
def measure(monkeypatch):
  """(answers to 'a', 'b', ... by group size, samples) -> (metrics, greedy samples)."""

  def run(written, *, samples):
    def make_draws(plan, policies, *, samples_per_prompt, **settings):
      def sample(params, prompts, records, ids, *, seed, step):
        assert len(ids) == 2  # always one shape
        texts = [t for i in ids for t in written[samples_per_prompt][int(i)]]
        return Drawn(rollout(texts, prompts.tokens))

      return sample

    monkeypatch.setattr(evaluate, 'make_draws', make_draws)
    problems = [{'prompt': p, 'answer': p} for p in 'abc']
    plan = HeldOut(
      every=1,
      source=sources.Source(len(problems), problems.__getitem__),
      reward={'moody': moody},
      problems=9,
      batch=2,  # the second batch is one problem and one to fill it up
      prompt_length=2,
      max_new_tokens=WIDTH,
      samples=samples,
      answer='(?s)(.*)',
    )
    return make_evaluator(
      types.SimpleNamespace(evaluation=plan, policy=(), tokenizer=TOKENIZER, mesh=None, seed=0)
    )({})

  return run


def test_greedy_accuracy_is_over_each_problem_once(measure):
  found, samples = measure({1: [['a'], ['x'], ['c']]}, samples=0)
  assert found == {
    'evaluation/greedy': 2 / 3,
    'evaluation/reward': 2 / 3,
    'evaluation/verifier_errors': 0,
  }
  assert samples == [('a', 'a', 1.0), ('b', 'x', 0.0), ('c', 'c', 1.0)]


def test_verifier_errors_are_counted_and_stay_out_of_every_rate(measure):
  greedy = [['a'], ['?'], ['x']]
  several = [['a', '?', '?'], ['x', 'x', 'b'], ['c', 'c', 'x']]
  found, samples = measure({1: greedy, 3: several}, samples=3)
  assert found == {
    'evaluation/greedy': 1 / 2,
    'evaluation/reward': 1 / 2,
    'evaluation/pass@1': pytest.approx((1 + 1 / 3 + 2 / 3) / 3),
    'evaluation/pass@3': 1.0,  # of the two problems with three verified samples
    'evaluation/maj@3': pytest.approx(2 / 3),
    'evaluation/verifier_errors': 3,
  }
  assert math.isnan(samples[1][2])


def test_when_every_verifier_fails_nothing_is_claimed(measure):
  found, _ = measure({1: [['?']] * 3}, samples=0)
  assert math.isnan(found['evaluation/greedy']) and math.isnan(found['evaluation/reward'])
  assert found['evaluation/verifier_errors'] == 3


def test_held_out_pairs_are_measured_by_the_objective_in_batches_that_do_not_divide():
  """Against a transcription of DPO (arXiv:2305.18290) in float64."""
  config = dpo.get_config('smoke,warm_start=0')
  config.model.num_layers = 1
  phase = config.phases.train
  phase.collect.pairs, phase.held_out_records = 4, 6
  phase.held_out = {'pairs': phase.source}
  experiment = build.build(config)
  phase = experiment.phases['train']
  state = phases.begin(experiment, 0, None)
  random = np.random.default_rng(1)
  noisy = lambda x: x + jnp.asarray(0.1 * random.normal(size=x.shape), x.dtype)
  moved = jax.tree.map(noisy, state.params)
  state = state.replace(params=moved)
  with jax.set_mesh(experiment.mesh):
    measure = evaluate.make_row_evaluator(phase, phases.context(experiment, phase, 0))
    found = measure(state)
    records = [{**phase.source[i], 'id': i} for i in range(6)]
    batch = phase.collect.lay_out(records, tokenizer=experiment.tokenizer)
    look = jax.jit(lambda params: forward(experiment.policy, params, batch).logp)
    logp = [look(params) for params in (moved, state.anchors['reference'])]
  ratio = np.where(batch.mask, np.asarray(logp[0], np.float64) - np.asarray(logp[1], np.float64), 0)
  chosen, rejected = phase.objective.beta * ratio.sum(axis=1).reshape(6, 2).T
  expected = {
    'loss': np.mean(np.log1p(np.exp(rejected - chosen))),
    'accuracy': np.mean(chosen > rejected),
    'margin': np.mean(chosen - rejected) / phase.objective.beta,
    'chosen_reward': np.mean(chosen),
    'rejected_reward': np.mean(rejected),
  }
  assert 0 < expected['accuracy'] < 1
  for name, value in expected.items():
    np.testing.assert_allclose(found[f'evaluation/pairs/{name}'], value, rtol=2e-4, err_msg=name)
  # What the main prints of a checkpoint.
  with jax.set_mesh(experiment.mesh):
    assert evaluate.row_metrics(experiment, moved, state.anchors) == found


def test_files_hold_out_demonstrations_and_pairs(tmp_path):
  data = tmp_path / 'data.jsonl'
  line = {'prompt': '1+1=', 'chosen': '2', 'rejected': '3', 'answer': '2'}
  data.write_text(''.join(json.dumps(line) + '\n' for _ in range(20)))
  text = f'task=jsonl,data={data},model=tiny,prompt_length=8,max_new_tokens=4,held_out_problems=5'
  for method, name in (('dpo', 'pairs'), ('sft', 'demonstrations')):
    phase = build.build(from_text(f'method={method},{text}')).phases['train']
    assert {k: len(source) for k, source in phase.held_out.items()} == {name: 2}
    assert len(phase.source) == 18 and phase.held_out_records == 5
  assert not from_text(f'method=dpo,{text},holdout=0').phases.train.held_out
  config = from_text(f'method=grpo,{text},reward=exact_match')
  assert not config.phases.train.held_out
  config.phases.train.held_out = {'pairs': config.phases.train.source}
  with pytest.raises(ValueError, match=r'train\.held_out: this phase samples its completions'):
    build.build(config)


def test_an_environment_pays_beside_the_verifiers_and_its_failures_are_neither_right_nor_wrong(
  monkeypatch,
):
  episodes = {
    0: Episode(turns=['x', 'a'], observations=['no'], rewards=[0.5, 1.0], metrics=[{}, {}]),
    1: Episode(turns=['b'], failure=Failure('Timeout', 'no answer')),
    2: Episode(turns=['x'], rewards=[0.25], metrics=[{}]),
  }

  def make_draws(plan, policies, **settings):
    def sample(params, prompts, records, ids, **step):
      found = [episodes[record['id']] for record in records]
      return Drawn(rollout([e.turns[-1] for e in found], prompts.tokens), found)

    return sample

  monkeypatch.setattr(evaluate, 'make_draws', make_draws)
  problems = [{'prompt': p, 'answer': p} for p in 'abc']
  plan = HeldOut(
    source=sources.Source(3, problems.__getitem__),
    reward={'exact': verifiers.exact_match},
    batch=2,
    prompt_length=2,
    max_new_tokens=WIDTH,
    environment=Guess(),
  )
  run = types.SimpleNamespace(evaluation=plan, policy=(), tokenizer=TOKENIZER, mesh=None, seed=0)
  found, samples = make_evaluator(run)({})
  assert found == {
    'evaluation/greedy': 1 / 2,
    'evaluation/reward': (2.5 + 0.25) / 2,
    'evaluation/verifier_errors': 0,
    'evaluation/turns': 4 / 3,
    'evaluation/environment_errors': 1,
  }
  assert [round(score, 2) for _, _, score in samples][::2] == [2.5, 0.25]
  assert math.isnan(samples[1][2]) and samples[1][1].endswith('[failed] Timeout: no answer')
  assert samples[0][1] == '[turn 1, reward 0.5] x\n[read] no\n[turn 2, reward 1] a'
