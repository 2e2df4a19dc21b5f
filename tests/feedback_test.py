"""Labelled rows in a run: KTO's mismatched rows are scored by the live policy and the reference."""

import jax
import numpy as np
import pytest

from polgrad import build, learner, phases
from polgrad.collect import Feedback
from polgrad.types import Batch
from tests.runs import Run


def test_mismatched_rows_are_scored_as_rows_of_their_own():
  run = build.build(Run('kto').get_config('smoke,warm_start=0'))
  phase = run.phases['train']
  state = phases.begin(run, 0, None)
  moved = jax.tree.map(lambda x: 0.5 * x, state.params)
  draw = phases.Drawer(phase, 0, 0, run.tokenizer)
  context = phases.context(run, phase, 0)
  got = phase.collect.make(context)(state.replace(params=moved), draw, 0).batch

  records = phases.Drawer(phase, 0, 0, run.tokenizer)(phase.collect.records)
  laid = phase.collect.lay_out(records, tokenizer=run.tokenizer).features
  rows = Batch(**{k: laid[f'mismatched_{k}'] for k in ('tokens', 'segment_ids', 'mask')})
  own, other = (learner.forward(run.policy, p, rows).logp for p in (moved, state.params))
  expected = np.where(rows.mask, own - other, 0).sum(axis=1)
  assert np.abs(expected).min() > 0.01
  np.testing.assert_allclose(got['mismatched_log_ratio'], expected, rtol=1e-4)
  assert got.features.keys() == {'mismatched_log_ratio'}  # the tokens are not carried on


def test_mismatches_need_two_rows():
  with pytest.raises(ValueError, match='rows: mismatched=True takes completions of other rows'):
    Feedback(rows=1, mismatched=True)
