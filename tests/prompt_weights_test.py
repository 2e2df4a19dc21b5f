"""Density ratios of prompts: the classifier, its features, and the file that is written."""

import json
import pathlib
import types

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from scipy.optimize import minimize

from polgrad import collect, methods, prompt_weights
from polgrad.data import batching, sources
from tests import hub
from tests.data.tables_test import write

flags.FLAGS.mark_as_parsed()


def test_the_classifier_minimises_its_objective():
  """Another minimiser, on the objective as it is written."""
  rng = np.random.default_rng(0)
  good = rng.random(60) < 0.3
  features = rng.normal(size=(60, 3)) * [1, 10, 0.1] + good[:, None]
  features = np.column_stack([features, np.full(60, 7.0)])  # one that is constant
  found = prompt_weights.fit(features, good, ridge=2.0)
  x = (features - features.mean(0)) / np.append(features[:, :3].std(0), 1)

  def objective(w):
    losses = [np.logaddexp(0, -(2 * g - 1) * (row @ w[:4] + w[4])) for row, g in zip(x, good)]
    kinds = [np.mean([l for l, g in zip(losses, good) if g == kind]) for kind in (True, False)]
    return 30 * sum(kinds) + np.sum(w[:4] ** 2)

  wanted = minimize(objective, np.zeros(5), method='BFGS', options={'gtol': 1e-8}).x
  np.testing.assert_allclose(np.append(found.weights, found.bias), wanted, atol=1e-5)
  np.testing.assert_allclose(found(features), x @ wanted[:4] + wanted[4], atol=1e-4)


def test_the_ratio_is_that_of_the_densities():
  """Normal distributions around -1/2 and 1/2 have the ratio exp(x), in whichever numbers they occur."""
  rng = np.random.default_rng(0)
  good = np.arange(60_000) < 10_000
  x = rng.normal(size=60_000) + np.where(good, 0.5, -0.5)
  logits = prompt_weights.fit(x[:, None], good)(np.array([[-1.0], [0.0], [1.0]]))
  np.testing.assert_allclose(logits, [-1, 0, 1], atol=0.05)
  assert prompt_weights.accuracy(x[:, None], good) == pytest.approx(0.6915, abs=0.01)  # Phi(1/2)


def test_rows_of_one_kind_and_separable_rows():
  with pytest.raises(ValueError, match='all 3 rows are good; there must be both'):
    prompt_weights.fit(np.zeros((3, 2)), np.ones(3, bool))
  found = prompt_weights.fit(np.array([[0.0], [0], [1], [1]]), np.array([0, 0, 1, 1], bool))
  assert 0 < found(np.array([[1.0]]))[0] < 2  # the penalty keeps it finite


def test_features_are_means_over_the_tokens_of_the_prompt():
  policy = types.SimpleNamespace(hidden=lambda params, tokens, segments: params[tokens])
  tokens, segments = np.array([[1, 2, 0], [2, 0, 0]]), np.array([[1, 1, 0], [1, 0, 0]])
  found = prompt_weights.mean_hidden(policy, jnp.array([[9.0], [1], [3]]), tokens, segments)
  assert found.tolist() == [[2.0], [3.0]]


def test_the_file_has_a_ratio_for_each_record_and_bco_reads_it(tmp_path, capsys, monkeypatch):
  folder = hub.small('qwen3', tmp_path)
  questions = ('hello', 'who are you?', 'a', 'good bye world', 'b')
  rows = [{'prompt': q, 'completion': 'yes', 'label': i % 2} for i, q in enumerate(questions)]
  rows[1]['id'] = 'mine'
  data, out = write(tmp_path / 'labels.jsonl', rows), str(tmp_path / 'weighted.jsonl')
  features = np.array([[1.0, 0], [0, 1], [2, 1], [0, 0], [1, 1]])
  asked = []
  monkeypatch.setattr(prompt_weights, 'embed', lambda *args: asked.append(args) or features)
  with flagsaver.flagsaver(model=folder, feedback=data, out=out, compilation_cache=''):
    prompt_weights.main(['prompt_weights'])
  assert capsys.readouterr().out.startswith('ratios of the 3 bad rows: median ')
  found = [json.loads(line) for line in pathlib.Path(out).read_text().splitlines()]
  assert [{k: v for k, v in r.items() if k != 'density_ratio'} for r in found] == rows
  # Only prompts are embedded: what the sampler would read.
  [(experiment, _, prompts)] = asked
  source = sources.jsonl(path=out)
  for i, ids in enumerate(prompts):
    assert ids == batching.read({**source[i], 'id': i}, experiment.tokenizer)[0].ids
  good = np.array([r['label'] for r in rows], bool)
  ratios = np.exp(prompt_weights.fit(features, good)(features))
  np.testing.assert_allclose([r['density_ratio'] for r in found], ratios, rtol=1e-4)

  # A record that cannot be read is named by its line; the file has empty lines between records.
  bad = write(tmp_path / 'bad.jsonl', [*rows, {'prompt': 'c', 'completion': 'yes'}])
  flags_of = dict(model=folder, feedback=bad, out=out, compilation_cache='')
  with flagsaver.flagsaver(**flags_of), pytest.raises(SystemExit):
    prompt_weights.main(['prompt_weights'])
  assert "bad.jsonl:11: no 'label'" in capsys.readouterr().err

  reader = methods.bco(density_ratio=True).collect(length=64)
  assert isinstance(reader, collect.Feedback)
  batch = reader.lay_out([{**source[0], 'id': 0}], tokenizer=experiment.tokenizer)
  np.testing.assert_allclose(batch.features['density_ratio'], ratios[:1], rtol=1e-4)
  with pytest.raises(batching.Unusable, match='density_ratio must be at least 0, got -1'):
    reader.lay_out([{**source[0], 'id': 0, 'density_ratio': -1}], tokenizer=experiment.tokenizer)
  with pytest.raises(ValueError, match='the rows of a pair have the same one'):
    methods.bco(paired=True, density_ratio=True)
