"""Rollouts from the prompt and from states of given answers, each with its targets."""

import dataclasses

import jax
import numpy as np
import pytest

from polgrad import collect, methods, phases
from polgrad.collect import beginnings
from polgrad.registry import bind, part
from polgrad.types import STREAMS
from tests import examples
from tests.collect_test import experiment

pytestmark = pytest.mark.usefixtures('samplers_once')


def test_rows_say_whether_they_began_in_a_state_of_the_data():
  run = experiment()
  sizes = dict(prompts=8, samples_per_prompt=2, prompt_length=11, max_new_tokens=5, lag=1)
  method = methods.hnpg(resets=0.5)
  collector = bind(part(collect.Restarts, **method.collect.keywords, **sizes), collect.TABLE)
  seen, real = [], run.phases['train'].score

  def noted(texts, records, lengths, others):
    seen.extend('begun' in record for record in records)
    return real(texts, records, lengths, others)

  phase = examples.changed(run.phases['train'], collect=collector, score=noted)
  run = dataclasses.replace(run, phases={'train': phase})
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    make = collector.make(phases.context(run, phase, 0))
    batch = make(state, phases.Drawer(phase, seed=0, cursor=0), 0).batch
  wanted = [STREAMS.index('demonstration' if begun else 'sampled') for begun in seen]
  assert len(seen) == 16 and 0 < sum(seen) < 16
  np.testing.assert_array_equal(batch.stream, wanted)
  # A row from the prompt alone shows at most its six tokens there.
  given = (batch.segment_ids[:, :11] > 0).sum(axis=1)
  assert (given[~np.array(seen)] == 6).all() and (given[np.array(seen)] > 6).all()


def test_the_weight_of_the_critic_in_states_of_the_data_is_its_own():
  streams = methods.hnpg(value_coefficient=0.5, offline_weight=3.0).objective.streams
  weights = {name: one.penalties.value.weight for name, one in streams.items()}
  assert weights == {'demonstration': 1.5, 'sampled': 0.5}


def test_both_kinds_of_rows_are_needed():
  for resets in (0.0, 1.0):
    with pytest.raises(ValueError, match='resets must be above 0 and below 1'):
      methods.hnpg(resets=resets)
  for settings in ({}, dict(beginning=part(beginnings.uniform), hints=1)):
    with pytest.raises(ValueError, match=r'needs a beginning, .* and no hints'):
      bind(part(collect.Restarts, **settings), collect.TABLE)
