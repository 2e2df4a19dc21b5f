"""How much reward a scorer adds to a model's decoding, on a reward that is easy to learn.

    python -m benchmarks.controlled_decoding        # prints the table of docs/controlled_decoding.md

The tiny model learns two-digit addition for 60 steps; then `cd_fudge` and `cd_q` train a scorer on 60
batches whose reward is the fraction of digits below 5. Every kind of decoding completes 400 held-out
problems at temperature 1. Some minutes on two cores.
"""

import functools
import pathlib
import tempfile

import jax
import numpy as np

from polgrad import build, evaluate, train
from polgrad.options import from_text
from polgrad.registry import part, weighted
from polgrad.sampling import behavior_policies, make_block_sampler, make_sampler, prefix_value

STRENGTHS = (0.0, 2.0, 8.0, 32.0)
CANDIDATES = 4


def low_digits(completion: str, record: dict) -> float:
  """Fraction of the digits that are below 5."""
  del record
  digits = [c for c in completion if c.isdigit()]
  return sum(c < '5' for c in digits) / max(len(digits), 1)


def trained(method: str, folder: str):
  """The experiment, the parameters of the model, and those of its scorer."""
  config = from_text(
    f'method={method},task=addition,model=tiny,steps=60,warm_start=60,learning_rate=0.003,'
    'trackers=none'
  )
  with config.unlocked():
    reward = {'low_digits': weighted(1.0, part(low_digits))}
    config.phases.train.reward = reward
    config.evaluation.reward = reward
    config.evaluation.every = config.show_samples = 0
  train.run(config, folder)
  experiment = build.build(config)
  checkpoints = str(pathlib.Path(folder) / 'checkpoints')
  model = evaluate.restore_params(experiment, checkpoints, name='teacher')
  return experiment, model, evaluate.restore_params(experiment, checkpoints)


def decoders(experiment, model, scorer) -> dict:
  """By name: functions with the interface that `evaluate.attempt` calls; they ignore its parameters."""
  plan, policy = experiment.evaluation, experiment.policy
  tokenizer = plan.own(experiment.tokenizer)
  common = dict(
    max_new_tokens=plan.max_new_tokens,
    stop_ids=tokenizer.stop_ids,
    pad_id=tokenizer.pad_id,
    mesh=experiment.mesh,
  )
  found = {}
  for strength in STRENGTHS:
    steered = make_sampler(
      {'reference': policy, 'scorer': policy},
      behavior_policy=functools.partial(behavior_policies.controlled, strength=strength),
      **common,
    )
    found[f'tokens, strength {strength:g}'] = steered, {'reference': model, 'scorer': scorer}
  for block, name in ((1, 'blocks of 1 token'), (plan.max_new_tokens, 'whole completions')):
    blocks = make_block_sampler(
      {'policy': policy},
      score=prefix_value(policy, scorer),
      candidates=CANDIDATES,
      block_tokens=block,
      **common,
    )
    found[f'best of {CANDIDATES} {name}'] = blocks, {'policy': model}
  return found


def main() -> None:
  rewards = {}
  for method in ('cd_fudge', 'cd_q'):
    with tempfile.TemporaryDirectory() as folder:
      experiment, model, scorer = trained(method, folder)
      with jax.set_mesh(experiment.mesh):
        for name, (sample, params) in decoders(experiment, model, scorer).items():
          draw = lambda _, *rows, sample=sample, params=params, **k: sample(params, *rows, **k)
          scores = evaluate.attempt(experiment, draw, None, 1).scores
          rewards.setdefault(name, []).append(float(np.mean(scores)))
  print('| decoding | `cd_fudge` | `cd_q` |\n|---|---|---|')
  for name, (fudge, q) in rewards.items():
    print(f'| {name} | {fudge:.3f} | {q:.3f} |')


if __name__ == '__main__':
  main()
