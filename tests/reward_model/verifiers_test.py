"""Reward models as verifiers: the rows that they read, what they say of them, and what is refused."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from polgrad import collect, identity, learner, methods, reward_models
from polgrad.data import batching, tokenizers
from polgrad.models import hf
from polgrad.options import from_text
from polgrad.registry import Weighted, bind, part
from polgrad.rewards.scoring import Failure, make_scorer
from tests import hub

BYTES = tokenizers.byte()
PAIR = dict(id=0, prompt='How?', chosen='Well.', rejected='No', answer='Fine', margin=0.5)
RECORDS = [dict(prompt=f'Say {i}', answer='Hello world', id=i) for i in range(3)]
TEXTS = ['Hello world', '42!', 'I am well. The answer is 42!']


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  folder = tmp_path_factory.mktemp('reward')
  return [hub.reward_model(folder, seed) for seed in (0, 1)]


def verifier(path, **knobs):
  return bind(part(reward_models.reward_model, path=path, batch=4, **knobs), reward_models.REWARDS)


def test_a_row_may_read_another_completion_first():
  ids = lambda text: BYTES.encode(text) + list(BYTES.stop_ids)
  prompt = [BYTES.bos_id, *BYTES.encode('How?')]
  rows = {
    '': ('Well.', 'No'),
    'other': ('No\0Well.', 'Well.\0No'),
    'answer': ('Fine\0Well.', 'Fine\0No'),
  }
  for before, texts in rows.items():
    collector = collect.Preferences(length=64, before=before)
    batch = collector.lay_out([PAIR], tokenizer=BYTES)
    for row, text in enumerate(texts):
      parts = [prompt + ids(one) for one in text.split('\0')]
      whole = [i for one in parts for i in one]
      assert batch.tokens[row, : len(whole)].tolist() == whole
      assert batch.segment_ids[row].sum() == len(whole)
      own = len(
        ids(text.split('\0')[-1])
      )  # the mask has the row's own completion and its stop token
      assert np.flatnonzero(batch.mask[row]).tolist() == list(range(len(whole) - own, len(whole)))
      # A reward model in use reads the same tokens as in training.
      *first, last = text.split('\0')
      assert batching.judged(PAIR, BYTES, last, first=first[0] if first else None) == whole
    assert batch.label.tolist() == [1, 0]


def test_numbers_of_records_are_features_of_their_rows():
  method = methods.reward_regression(target_field='margin')
  batch = method.collect(length=64).lay_out([PAIR], tokenizer=BYTES)
  assert batch.features['target'].tolist() == [0.5]
  method = methods.bradley_terry(margin_field='margin')
  batch = method.collect(length=64).lay_out([PAIR], tokenizer=BYTES)
  assert batch.features['annotated_margin'].tolist() == [0.5, 0.5]
  with pytest.raises(ValueError, match="before='other' and prompt_length=8"):
    collect.Preferences(before='other', prompt_length=8)


def test_the_score_is_that_of_the_head_after_the_stop_token(models):
  policy = hf.pretrained(path=models[0], value_head=True)
  tokenizer = tokenizers.huggingface(path=models[0])
  params = policy.init(jax.random.key(0))
  records = [{'id': 0, 'messages': [{'role': 'user', 'content': 'Say 0'}], 'answer': TEXTS[0]}]
  batch = batching.supervised(records, tokenizer, length=40)
  fields = frozenset({'values', 'values_after'})
  out = jax.jit(lambda p: learner.forward(policy, p, batch, fields=fields))(params)
  last = np.flatnonzero(batch.mask[0])[-1]
  assert batch.tokens[0, last] == tokenizer.stop_ids[0]
  np.testing.assert_array_equal(out.values[0, 1:], out.values_after[0, :-1])
  (found,) = verifier(models[0])([TEXTS[0]], RECORDS[:1])
  np.testing.assert_allclose(found, out.values_after[0, last], atol=1e-5)


def test_rewards_are_normalised_clipped_and_pessimistic(models):
  one, two = (np.array(verifier(path)(TEXTS, RECORDS)) for path in models)
  ensemble = dict(ensemble=(models[1],))
  both = np.stack([one, two])
  cases = [
    (dict(mean=0.2, std=0.1, clip=3.0), np.clip((one - 0.2) / 0.1, -3, 3)),
    (ensemble | dict(pessimism=2.0), both.mean(axis=0) - 2 * both.std(axis=0)),
    (ensemble | dict(combine='min', std=0.5), both.min(axis=0) / 0.5),
  ]
  for knobs, wanted in cases:
    np.testing.assert_allclose(verifier(models[0], **knobs)(TEXTS, RECORDS), wanted, atol=1e-5)


def test_a_row_that_cannot_be_scored_has_failed_and_the_others_have_not(models):
  texts = ['Hello ' * 300, 'a <|im_end|> within', TEXTS[2]]
  score = make_scorer({'model': Weighted(2.0, verifier(models[0]))})
  found = score(texts, RECORDS, [1, 1, 1])
  assert found.errors == {'model/TooLong': 1, 'model/ValueError': 1}
  assert found.valid.tolist() == [False, False, True]
  (alone,) = verifier(models[0])(texts[2:], RECORDS[2:])
  np.testing.assert_allclose(found.total[2], 2 * alone, atol=1e-5)
  (missing,) = verifier(models[0], before='reference')(TEXTS[:1], RECORDS[:1])
  assert isinstance(missing, Failure) and 'has no completion' in missing.reason


def test_a_model_that_reads_both_completions_compares_them_in_both_orders(models):
  knobs = dict(path=models[0], batch=4, temperature=0.05)
  compare = bind(part(reward_models.preference_model, **knobs), reward_models.COMPARISONS)
  swapped = TEXTS[1:] + TEXTS[:1]
  one, other = (np.array(compare(*pair, RECORDS)) for pair in ((TEXTS, swapped), (swapped, TEXTS)))
  np.testing.assert_allclose(one + other, 1, atol=1e-6)
  scores = lambda texts, firsts: np.array(
    verifier(models[0], before='first')(
      texts, [r | {'first': first} for r, first in zip(RECORDS, firsts)]
    )
  )
  logit = scores(TEXTS, swapped) - scores(swapped, TEXTS)
  np.testing.assert_allclose(one, 1 / (1 + np.exp(-logit / 0.05)), atol=1e-4)
  assert np.abs(one - 0.5).max() > 0.01
  short, long = compare(['a', 'a'], ['b', 'b ' * 300], RECORDS[:2])
  assert 0 < short < 1 and long.kind == 'TooLong'


def test_what_is_no_reward_model_is_refused_when_the_run_is_built(models, tmp_path):
  with pytest.raises(ValueError, match='holds no reward model, but a language model'):
    verifier(str(pathlib.Path(models[0]).parent / 'source0' / 'first'))
  with pytest.raises(FileNotFoundError, match=r'config: .*expected the folder of a reward model'):
    verifier(str(tmp_path))
  with pytest.raises(ValueError, match='devices=99 and fsdp=1 do not fit'):
    verifier(models[0], devices=99)


def test_options_of_a_run_name_it_and_its_files_are_part_of_what_the_run_is(models, tmp_path):
  data = tmp_path / 'problems.jsonl'
  data.write_text(''.join(json.dumps(RECORDS[0] | {'id': i}) + '\n' for i in range(20)))
  other = tmp_path / 'other'
  shutil.copytree(models[1], other)
  options = f'reward=reward_model,reward.path={models[0]},reward.ensemble={other},reward.clip=2.0'
  config = from_text(f'method=grpo,task=jsonl,data={data},model=hf,path={models[0]},{options}')
  spec = config.phases.train.reward.reward_model
  assert spec.ensemble == (str(other),) and spec.clip == 2.0 and spec.weight == 1.0
  before = identity.describe(config)
  file = other / 'model.safetensors'
  content = bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  (found,) = identity.differences(before, identity.describe(config))
  assert found == f'{other}: other contents than before'


def test_the_tokenizer_of_a_larger_model_is_refused(models, tmp_path):
  shutil.copytree(models[0], tmp_path / 'mixed')
  file = tmp_path / 'mixed' / 'tokenizer.json'
  content = json.loads(file.read_text())
  content['model']['vocab'] |= {f'more{i}': i for i in range(640, 650)}
  file.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=r'mixed: its tokenizer has 650 tokens, its model 640'):
    verifier(str(tmp_path / 'mixed'))(['x'], [{'prompt': 'y'}])
