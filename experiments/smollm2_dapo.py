"""DAPO (arXiv:2503.14476) on SmolLM2-135M-Instruct: sums and differences of reasoning-gym.

The model talks its way around sums and differences of two numbers of one or two digits. The reward is
reasoning-gym's verdict on the last number of the reply; no answer is shown. The loss is DAPO's without
its length penalty, with one update a batch. Options: path (of the model's folder), lora, steps, smoke.

    python -m polgrad.train --config=experiments/smollm2_dapo.py:path=FOLDER --workdir=runs/smollm2_dapo

Measured on 2 shared CPU cores, float32, one seed, median 25 s a step: greedy accuracy on 64 held-out
problems (standard error 0.06) after 0, 10, 20, 30 steps is 0.08, 0.41, 0.48, 0.52. Mean sampled reward
of five steps at a time: 0.29, 0.45, 0.34, 0.66, 0.52, 0.52 (dynamic sampling replaces groups without
signal, so it reads high at first). The model learns to answer at once and to the point, and then to
add. One-digit problems are few, so they also occur in training.

Plain GRPO (arXiv:2402.03300), `experiments/run.py:method=grpo,task=chain_sum,model=smollm2`, takes 10
s a step and comes less far: 0.47, 0.47, 0.41 after 10, 20, 30 steps. Two thirds of its groups have equal
rewards and teach nothing (dynamic sampling replaces these), and its KL penalty pulls it back.
"""

import dataclasses
from functools import partial

from polgrad import collect, methods, presets, tasks
from polgrad.compose import compose
from polgrad.options import values


def get_config(text: str = ''):
  o = values(text, path='', lora=0, steps=30, smoke=False)
  task = tasks.chain_sum()
  method = dataclasses.replace(
    methods.dapo(max_new_tokens=task.max_new_tokens),
    collect=partial(collect.Rollouts, max_resamples=1),
    rewards={},
    minibatches=1,
  )
  model = presets.smollm2(path=o.path, lora=o.lora)
  return compose(method, task, model, steps=o.steps, smoke=o.smoke)
