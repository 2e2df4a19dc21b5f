"""Model operations are those of the formula and of XLA's count; times go to the innermost part."""

import functools
import time
import types

import jax
import numpy as np
import pytest

from polgrad import build, phases, speed
from polgrad.learner import forward
from polgrad.models.config import Config
from polgrad.types import Batch, Layout
from tests.models import tiny
from tests.runs import addition, method_of


def batch(rows=4, prompt=3, completion=5, padding=0) -> Batch:
  """Rows of a prompt, padded on the left, and a completion that is scored."""
  length = padding + prompt + completion
  column = np.tile(np.arange(length), (rows, 1))
  return Batch(
    tokens=np.ones((rows, length), np.int32),
    segment_ids=(column >= padding).astype(np.int32),
    mask=column >= padding + prompt,
  )


def test_a_forward_pass_has_the_operations_that_xla_counts():
  rows = batch(rows=8, prompt=1, completion=31)
  policy = tiny.policy(num_layers=1)  # XLA counts a loop over layers once
  traced = jax.jit(functools.partial(forward, policy)).lower(policy.shapes(), rows)
  counted = traced.cost_analysis()['flops']
  # XLA computes the scores of later tokens too, and leaves them out afterwards.
  config, n = policy.config, 32
  later = 4 * config.num_heads * config.head_dim * config.num_layers * 8 * (n * n - n * (n + 1) / 2)
  own = speed.forward_flops(config, rows)
  assert own < counted and own + later == pytest.approx(counted, rel=0.15)


def test_an_update_has_six_operations_a_weight_and_token_and_those_of_attention():
  config, rows = tiny.policy(tie_embeddings=False).config, batch(prompt=0, completion=8)
  names = ('query', 'key', 'value', 'out', 'gate', 'up', 'down')
  weights = sum(np.prod(config.shape(n)) for n in names) * config.num_layers
  weights += np.prod(config.shape('unembedding'))
  attention = 12 * config.num_heads * config.head_dim * config.num_layers * 4 * (8 * 9 / 2)
  assert speed.update_flops(config, rows) == 6 * weights * 4 * 8 + attention


def test_a_shared_prompt_counts_once_and_padding_never():
  config = tiny.policy().config
  alone = speed.forward_flops(config, batch(rows=1))
  prompt = speed.forward_flops(config, batch(rows=1, completion=0))
  shared = speed.forward_flops(config, batch(rows=6, padding=2), Layout(prompt_length=5, shared=3))
  assert shared == pytest.approx(6 * alone - 4 * prompt)


def test_a_local_layer_sees_its_window_alone():
  local = tiny.policy(window=3, local_layers=(0,)).config
  whole = speed.forward_flops(tiny.policy().config, batch(rows=1))
  pairs = sum(min(t, 3) for t in range(1, 9)) - 8 * 9 / 2
  assert speed.forward_flops(local, batch(rows=1)) == whole + 4 * 4 * 6 * pairs


def test_experts_count_as_many_as_a_token_passes_and_a_frozen_base_has_no_weight_gradients():
  sizes = dict(tiny.SHAPE, num_experts=8, experts_per_token=2)
  dense = speed.forward_flops(Config(**tiny.SHAPE), batch())
  extra = 2 * 2 * 4 * 8 * (3 * 16 * 24 + 16 * 8)  # one more expert and the router in two layers
  assert speed.forward_flops(Config(**sizes), batch()) == dense + extra
  lora = Config(**tiny.SHAPE, lora_rank=2, lora_targets=('query',))
  forward_ = speed.forward_flops(lora, batch())
  adapter = 2 * (2 * 2 * (16 + 24)) * 4 * 8
  assert forward_ == dense + adapter
  attention = 4 * 4 * 6 * 2 * 4 * 8 * 9 / 2
  assert speed.update_flops(lora, batch()) == 2 * forward_ + attention + adapter


@pytest.mark.parametrize(
  ('kind', 'peak'),
  [
    ('NVIDIA H200', 989e12),
    ('NVIDIA H100 80GB HBM3', 989e12),
    ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA A100-SXM4-40GB', 312e12),
    ('NVIDIA A10G', 70e12),
    ('NVIDIA L4', 121e12),
    ('Tesla V100-SXM2-16GB', 125e12),
    ('TPU v4', 275e12),
    ('TPU v5 lite', 197e12),
    ('TPU v5p', 459e12),
    ('TPU v6 lite', 918e12),
    ('NVIDIA RTX A4000', 0),
    ('cpu', 0),
  ],
)
def test_the_peak_is_that_of_the_device(kind, peak):
  assert speed.peak_of(kind) == peak


def test_the_clock_of_a_part_stops_while_an_inner_part_runs():
  meter = speed.Meter()
  with meter.timing('outer'):
    time.sleep(0.01)
    with meter.timing('inner'):
      time.sleep(0.05)
      meter.add('inner', 3)
    time.sleep(0.01)
  found = meter.take()
  assert found['flops/inner'] == 3 and not meter.take()
  assert 0.02 <= found['seconds/outer'] < 0.05 <= found['seconds/inner']


def test_utilization_is_the_fraction_of_the_peak():
  found = {'seconds/a': 2.0, 'flops/a': 10.0, 'seconds/b': 1.0, 'flops/b': 5.0, 'seconds/c': 1.0}
  assert speed.utilization(found, 4.0, 10.0) == {'mfu': 0.375, 'mfu/a': 0.5, 'mfu/b': 0.5}
  assert speed.utilization(found, 4.0, 0.0) == {}


def test_a_model_without_a_formula_has_no_operations():
  other = type('Other', (), {'vocab_size': 5})()
  meter = speed.Meter()
  meter.add('update', speed.update_flops(other, batch()))
  assert meter.take() == {} and speed.utilization({'seconds/update': 1.0}, 1.0, 10.0) == {}


def test_memory_is_the_largest_peak_and_absent_where_no_device_tells(monkeypatch):
  assert speed.peak_memory() == {}
  devices = [
    type('Device', (), {'memory_stats': lambda self, n=n: {'peak_bytes_in_use': n * 2**30}})()
    for n in (1, 3)
  ]
  monkeypatch.setattr(speed.jax, 'local_devices', lambda: devices)
  assert speed.peak_memory() == {'peak_memory': 3.0}


def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path, capsys):
  profiler = speed.Profiler(str(tmp_path / 'profile'), speed.parse_steps('1:3', 0, 5))
  for step in range(5):
    profiler.begin(step)
    jax.block_until_ready(jax.numpy.ones(2) + step)
    profiler.end(step)
  [trace] = tmp_path.rglob('*.xplane.pb')
  text = trace.read_bytes()
  assert text.count(b'step_num') and b'step' in text
  assert 'a trace of steps 1 to 2 is in' in capsys.readouterr().out


@pytest.mark.parametrize('text', ['5', '2:2', '3:2', 'a:b', '-1:2', '1:2:3', '2:11', '0:2', ':'])
def test_steps_to_trace_that_the_run_does_not_make_are_refused(text):
  with pytest.raises(ValueError, match=f'--profile_steps={text}: '):
    speed.parse_steps(text, 1, 10)
  assert [*speed.parse_steps('1:10', 1, 10)] == [*range(1, 10)] and not speed.parse_steps('', 1, 10)


@pytest.mark.parametrize('name', ['grpo', 'relift', 'prime', 'rlfr'])
def test_the_updates_of_a_step_are_all_counted(name):
  """`relift` may imitate beside its step, `prime` learns a reward model, and `rlfr` a network."""
  run = build.build(addition(method_of(name)))
  phase, rows, more = run.phases['train'], batch(), batch(rows=2)
  doing = types.SimpleNamespace(phase=phase, experiment=run)
  further = dict.fromkeys(phase.further, more)
  got = types.SimpleNamespace(batch=rows, further=further)
  layout = phase.layout
  wanted = {
    'grpo': 0.0,
    'relift': speed.update_flops(run.model.config, more),
    'prime': speed.update_flops(run.model.config, rows, layout),
    'rlfr': speed.forward_flops(run.model.config, rows, logits=False),
  }
  assert phases.PhaseRun.other_flops(doing, got) == wanted[name]


def test_a_reward_model_computes_no_logits():
  policy = tiny.policy(num_layers=1, vocab_size=20_000, value_head=True)
  rows = batch(prompt=0, completion=8)
  look = lambda params: (
    forward(policy, params, rows, fields=frozenset({'values_after'})).values_after
  )
  compiled = jax.jit(jax.grad(lambda p: look(p).sum())).lower(policy.shapes()).compile()
  own = speed.update_flops(policy.config, rows, logits=False)
  everything = speed.update_flops(policy.config, rows)
  assert everything > 20 * own
  assert compiled.cost_analysis()['flops'] < 3 * own
