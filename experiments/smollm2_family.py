"""GRPO or DAPO on SmolLM2-135M-Instruct: who is who in a family that a few sentences describe.

The problems are reasoning-gym's `family_relationships` ("David is married to Barbara. They have a child
called Jacob. ... What relation is Jacob to Barbara? Answer with a single word."). The model talks around
the answer. The reward is reasoning-gym's verdict on the last relation in the first ten tokens of the
reply; no answer is shown. `method=dapo` (arXiv:2503.14476) is as in `smollm2_dapo.py`: no length
penalty, one update a batch, groups of equal rewards replaced once. `method=grpo` is arXiv:2402.03300.
Options: method, path (of the model's folder), lora, steps, smoke.

    python -m polgrad.train --config=experiments/smollm2_family.py:path=FOLDER --workdir=runs/family

Measured on 2 shared CPU cores, float32, one seed: greedy accuracy on 64 held-out problems (standard
error at most 0.06) by the number of batches of 32 samples, and the mean reward of the samples, averaged
over ten batches. Dynamic sampling replaces groups without signal, so DAPO's mean reads high:

    batches             0     10     20     30     40
    DAPO, greedy     0.03   0.28   0.30   0.31   0.34
    DAPO, samples        0.23   0.36   0.41   0.47
    GRPO, greedy     0.03   0.19   0.20   0.22
    GRPO, samples        0.06   0.22   0.15

The model learns to name a relation at once, and which ones are common (the most frequent answer is 15%
of all); what it learns beyond that has not been told apart.
"""

import dataclasses
from functools import partial

from polgrad import collect, methods, presets, tasks
from polgrad.compose import compose
from polgrad.options import values

RELATION = '(?:grand)?(?:mother|father|son|daughter)(?:-in-law)?|sister|brother|husband|wife'


def get_config(text: str = ''):
  o = values(text, path='', method='dapo', lora=0, steps=40, smoke=False)
  if o.method not in METHODS:
    raise ValueError(f'method={o.method}: valid are {sorted(METHODS)}')
  task = tasks.reasoning_gym(
    task='family_relationships',
    pattern=RELATION,
    system='Reply with one word such as mother or husband.',
    prompt_length=72,
    max_new_tokens=10,
  )
  model = presets.smollm2(path=o.path, lora=o.lora)
  return compose(METHODS[o.method], task, model, steps=o.steps, smoke=o.smoke)


def dapo(*, max_new_tokens: int) -> methods.Method:
  return dataclasses.replace(
    methods.dapo(max_new_tokens=max_new_tokens),
    collect=partial(collect.Rollouts, max_resamples=1),
    rewards={},
    minibatches=1,
  )


METHODS = {'dapo': dapo, 'grpo': methods.grpo}
