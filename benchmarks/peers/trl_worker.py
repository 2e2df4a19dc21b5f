"""The TRL worker of the comparison: one kind of post-training in one process, timed step by step.

Run as `python benchmarks/peers/trl_worker.py WORK KIND`, KIND being `grpo`, `dpo` or `sft`. For
equal work TRL's defaults are changed: float32 in place of bf16, no gradient checkpointing, no
shuffling, a constant rate, no logging after the first step, and all rows of a step in one batch.
The data set is repeated once a step, so that the run is one epoch with no restarts in between.

* grpo: loss type `grpo` (the mean over a sequence's tokens, then over sequences) in place of
  `dapo` (the same here, all completions having full length); one iteration and one step a
  generation, so TRL needs no old log-probabilities; plain k3 KL (`use_bias_correction_kl` off).
* dpo: TRL always appends the end-of-text token, so `max_length` makes its collator cut it off
  again: 32 + 64 tokens a row. The reference is computed in the step, as is the default.
* sft: the rows are given as `input_ids`, so nothing is tokenised or appended.

The parts: `rollout` is `_generate` (tokenising, sampling, decoding), `reference` the frozen model's
forward pass, `update` all from the prepared batch to the step's end, less a reference in between.
PyTorch on a CPU returns finished results, so the clock needs no synchronising.
"""

import contextlib
import json
import os
import pathlib
import resource
import sys
import tempfile
import time

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # no network, and with it no telemetry

import datasets
import torch
import transformers
import trl


class Clock(transformers.TrainerCallback):
  """Sums the seconds of the wrapped parts of each step, and closes a step in `on_step_end`."""

  def __init__(self):
    self.steps, self.parts = [], {}

  def wrap(self, part, function):
    def timed(*args, **kwargs):
      start = time.perf_counter()
      result = function(*args, **kwargs)
      self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - start
      return result

    return timed

  def attach(self, trainer):
    prepare = trainer._prepare_inputs
    for name, part in ('_generate', 'rollout'), ('ref_model', 'reference'):
      if hasattr(trainer, name):
        setattr(trainer, name, self.wrap(part, getattr(trainer, name)))

    def prepared(*args, **kwargs):
      batch = prepare(*args, **kwargs)
      self.before = self.parts.get('reference', 0.0)
      self.ready = time.perf_counter()
      return batch

    trainer._prepare_inputs = prepared

  def on_train_begin(self, *args, **kwargs):
    self.last = time.perf_counter()

  def on_step_end(self, *args, **kwargs):
    now = time.perf_counter()
    inside = self.parts.get('reference', 0.0) - self.before
    self.steps.append(self.parts | {'update': now - self.ready - inside, 'step': now - self.last})
    self.parts, self.last = {}, now


def arguments(load, rows, folder):
  """The settings that the three kinds share."""
  plain = dict(bf16=False, gradient_checkpointing=False, use_cpu=True, max_steps=load['steps'])
  batch = dict(per_device_train_batch_size=rows, train_sampling_strategy='sequential')
  adamw = dict(optim='adamw_torch_fused', weight_decay=0.0, max_grad_norm=1.0)
  adamw |= dict(learning_rate=load['learning_rate'], lr_scheduler_type='constant')
  quiet = dict(save_strategy='no', report_to='none', disable_tqdm=True, output_dir=folder)
  quiet |= dict(logging_first_step=True, logging_steps=load['steps'] + 1)
  return plain | batch | adamw | quiet


def words(rows):
  return [' '.join(f't{i}' for i in ids) for ids in rows]


def table(columns, times):
  return datasets.Dataset.from_dict({name: list(rows) * times for name, rows in columns.items()})


def build_grpo(load, data, common):
  def reward(completion_ids, **_):
    assert {len(ids) for ids in completion_ids} == {load['new_tokens']}
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]

  rows = len(data['prompts']) * load['samples']
  group = dict(num_generations=load['samples'], num_iterations=1, steps_per_generation=1)
  sample = dict(temperature=1.0, top_p=1.0, top_k=0, max_completion_length=load['new_tokens'])
  loss = dict(loss_type='grpo', beta=load['beta'], use_bias_correction_kl=False)
  args = trl.GRPOConfig(**common(rows), **group, **sample, **loss, shuffle_dataset=False)
  prompts = table({'prompt': words(data['prompts'])}, load['steps'])
  return trl.GRPOTrainer, args, prompts, {'reward_funcs': reward}, rows * load['new_tokens']


def build_dpo(load, data, common):
  cut, rows, length = data['prompt_length'], len(data['chosen']), len(data['chosen'][0])
  loss = dict(beta=load['dpo_beta'], loss_type=['sigmoid'], precompute_ref_log_probs=False)
  args = trl.DPOConfig(**common(rows), **loss, max_length=length)
  columns = {'prompt': words(ids[:cut] for ids in data['chosen'])}
  for name in 'chosen', 'rejected':
    columns[name] = [f' {text} ' for text in words(ids[cut:] for ids in data[name])]
  return trl.DPOTrainer, args, table(columns, load['steps']), {}, 2 * rows * (length - cut)


def build_sft(load, data, common):
  rows, length = len(data['sft']), len(data['sft'][0])
  given = dict(max_length=None, packing=False, dataset_kwargs={'skip_prepare_dataset': True})
  texts = table({'input_ids': data['sft']}, load['steps'])
  return trl.SFTTrainer, trl.SFTConfig(**common(rows), **given), texts, {}, rows * (length - 1)


def run(work, kind, folder):
  load, data = (json.loads((work / name).read_text()) for name in ('workload.json', 'data.json'))
  build = {'grpo': build_grpo, 'dpo': build_dpo, 'sft': build_sft}[kind]
  trainer_of, args, rows, extra, tokens = build(load, data, lambda n: arguments(load, n, folder))
  tokenizer = transformers.AutoTokenizer.from_pretrained(work / 'model', padding_side='left')
  clock = Clock()
  given = dict(args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[clock])
  trainer = trainer_of(str(work / 'model'), **given, **extra)
  clock.attach(trainer)
  trainer.train()
  assert len(clock.steps) == load['steps']
  first, logged = clock.steps[0], trainer.state.log_history[0]
  return {
    **{'framework': 'trl', 'version': trl.__version__, 'kind': kind, 'first': first},
    'seconds': {part: [step[part] for step in clock.steps[1:]] for part in first},
    **{'tokens': tokens, 'loss': logged['loss'], 'grad_norm': logged['grad_norm']},
    'peak_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
  }


if __name__ == '__main__':
  torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))
  with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
    record = run(pathlib.Path(sys.argv[1]), sys.argv[2], folder)
  print(json.dumps(record))
