"""Distils SmolLM2-135M-Instruct into four of its layers, on text that the student samples itself.

    python -m benchmarks.distilled_student --teacher=FOLDER --folder=runs/distilled_student --seeds=0,1,2

The student begins as layers 0, 10, 20 and 29 of the teacher, with its embedding, and first learns
the teacher's distribution on the teacher's samples (forward KL, `WARM` steps). From there each
divergence is trained for `STEPS` steps on the student's samples. Prompts ask for a sentence about a
topic; the measured topics are others than the trained ones. What is measured, at temperature 1:

* teacher NLL: -log teacher of the student's samples, nats a token: how good they are;
* student NLL: -log student of the teacher's samples, nats a token: how much of the teacher is covered;
* entropy: negative log-likelihood that the student gives to its samples, in nats a token;
* distinct: the fraction of different pairs of consecutive tokens among all those of the samples.

Everything that is done already in --folder is not done again. The table that it prints has the mean of
the seeds, and the least and the largest value.

Measured with --warm=50 --steps=30 --seeds=0 on 2 busy CPU cores, batches of 8 rows of at most 24 tokens,
5 to 25 s a step (32 samples for each number, so differences of a few tenths are noise):

| student | teacher NLL | student NLL | entropy | distinct |
|---|---|---|---|---|
| the teacher itself | 2.68 | | | 0.92 |
| after the warm start | 7.56 | 5.87 | 5.37 | 0.91 |
| forward KL | 8.51 | 5.83 | 6.51 | 0.98 |
| Jensen-Shannon | 7.45 | 5.88 | 5.63 | 0.93 |
| reverse KL | 7.22 | 6.06 | 5.31 | 0.91 |
| skewed reverse KL | 7.40 | 5.88 | 5.51 | 0.93 |

The order is that of the theory: forward KL covers (more entropy, lower student NLL) and writes worse
text, reverse KL the opposite. All are far from the teacher: 240 samples do not train a language model.
"""

import argparse
import json
import pathlib
import shutil
from functools import partial
from typing import Any

import jax
import numpy as np

from polgrad import collect, convert, objectives, optim, presets, train
from polgrad.build import build
from polgrad.compose import compose
from polgrad.data import batching, sources
from polgrad.evaluate import EVALUATION_STEP, init_params
from polgrad.learner import forward
from polgrad.losses import aggregation, divergences
from polgrad.methods.base import Method
from polgrad.models.policy import Policy
from polgrad.registry import part
from polgrad.sampling import behavior_policies
from polgrad.sampling.sampler import make_sampler
from polgrad.tasks import Task
from polgrad.types import Batch, Params

Table = dict[str, dict[str, float]]  # student -> number -> value

SYSTEM = 'Answer in one short sentence.'
LAYERS = (0, 10, 20, 29)
ROWS, TOKENS = 8, 24  # rows of a batch, and new tokens of a row
RATES = {'warm': 5e-4, 'train': 2e-4}
TRAIN = (
  *(
    'the sea',
    'bread',
    'winter',
    'trains',
    'cats',
    'the moon',
    'coffee',
    'rivers',
    'music',
    'bees',
  ),
  *('bridges', 'salt', 'gardens', 'clocks', 'rain', 'horses', 'paper', 'islands', 'tea', 'stars'),
  *(
    'bicycles',
    'forests',
    'cheese',
    'maps',
    'wolves',
    'glass',
    'deserts',
    'apples',
    'ships',
    'ice',
  ),
  *('gold', 'books'),
)
HELD_FOLDER = (
  *('dogs', 'mountains', 'the sun', 'letters', 'snow', 'owls', 'honey', 'lakes'),
  *('wind', 'rice', 'lamps', 'wood', 'chess', 'roses', 'boats', 'spring'),
)
TRAINED = {
  'forward KL': part(divergences.forward_kl),
  'reverse KL': part(divergences.reverse_kl),
  'Jensen-Shannon': part(divergences.jensen_shannon),
  'skewed reverse KL': part(divergences.skew_reverse_kl, skew=0.1),
}


def topics(*, split: str) -> sources.Source:
  """Prompts about the topics of a split, 'train' or 'held_out'."""
  names = TRAIN if split == 'train' else HELD_FOLDER
  return sources.Source(
    len(names), lambda row: {'prompt': f'Write one sentence about {names[row]}.'}
  )


def shallow(teacher: str, out: pathlib.Path) -> None:
  """Writes a folder with the layers `LAYERS` of the teacher."""
  from safetensors import numpy as tensors

  shutil.copytree(teacher, out)
  stored = tensors.load_file(out / 'model.safetensors')
  kept = {k: x for k, x in stored.items() if '.layers.' not in k}
  for new, old in enumerate(LAYERS):
    name = f'.layers.{old}.'
    kept |= {k.replace(name, f'.layers.{new}.'): x for k, x in stored.items() if name in k}
  tensors.save_file(kept, out / 'model.safetensors')
  settings = json.loads((out / 'config.json').read_text()) | {'num_hidden_layers': len(LAYERS)}
  (out / 'config.json').write_text(json.dumps(settings))


def distillation(divergence: Any, *, of_teacher: bool) -> Method:
  """Distillation on samples of the student, or of the teacher."""
  asked = {'behavior_policy': part(behavior_policies.teacher)} if of_teacher else {}
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=1, **asked),
    objective=part(
      objectives.Distillation, divergence=divergence, aggregation=part(aggregation.token_mean)
    ),
    anchors={'teacher': part(optim.fixed)},
  )


def configured(
  student: str, *, teacher: str, method: Method, steps: int, rate: float, seed: int
) -> Any:
  """The configuration of a run from a student's folder."""
  task = Task(
    problems=part(topics, split='train'),
    prompt_length=16,
    max_new_tokens=TOKENS,
    rows=ROWS,
    evaluate_every=0,
    system=SYSTEM,
  )
  model = presets.hf(path=student)
  given = dict(steps=steps, learning_rate=rate, teacher=teacher, trackers='none', seed=seed)
  config = compose(method, task, model, **given)
  config.checkpoint_every = 0
  return config


def trained(config: Any, folder: str) -> tuple[Any, Params]:
  """The experiment of a run, and the parameters at its end."""
  return build(config), train.run(config, folder).params


def sampled(policy: Policy, params: Params, experiment: Any, seed: int) -> Batch:
  """Two samples of each held-out prompt."""
  chats = sources.as_chat(source=topics(split='held_out'), system=SYSTEM)
  records = [chats[i] | {'id': i} for i in range(len(chats))]
  tokenizer = experiment.tokenizer
  prompts = batching.prompts(records, tokenizer, length=80)
  draw = make_sampler(
    {'policy': policy},
    max_new_tokens=TOKENS,
    samples_per_prompt=2,
    stop_ids=tokenizer.stop_ids,
    pad_id=tokenizer.pad_id,
  )
  return draw(
    {'policy': params}, prompts.tokens, prompts.mask, prompts.ids, seed=seed, step=EVALUATION_STEP
  )


def nll(policy: Policy, params: Params, batch: Batch) -> float:
  """-log policy of the sampled tokens, nats a token."""
  logp = jax.jit(partial(forward, policy))(params, batch).logp
  return float(-np.where(batch.mask, logp, 0).sum() / np.sum(batch.mask))


def distinct(batch: Batch) -> float:
  """Different pairs of consecutive sampled tokens, as a fraction of all pairs."""
  rows = [np.asarray(t)[np.asarray(m)] for t, m in zip(batch.tokens, batch.mask)]
  pairs = [pair for row in rows for pair in zip(row[:-1].tolist(), row[1:].tolist())]
  return len(set(pairs)) / len(pairs)


def measured(
  experiment: Any, params: Params, teacher: tuple[Policy, Params], seed: int
) -> dict[str, float]:
  """The numbers of the table, for one student."""
  own = sampled(experiment.policy, params, experiment, seed=10 * seed + 1)
  others = sampled(*teacher, experiment, seed=10 * seed + 2)
  return {
    'teacher NLL': nll(*teacher, own),
    'student NLL': nll(experiment.policy, params, others),
    'entropy': nll(experiment.policy, params, own),
    'distinct': distinct(own),
  }


def one_seed(teacher: str, folder: pathlib.Path, seed: int, warm_steps: int, steps: int) -> Table:
  """Trains and measures all students of a seed; what is in the folder already is not done again."""
  folder.mkdir(parents=True, exist_ok=True)
  numbers = folder / 'table.json'
  found = json.loads(numbers.read_text()) if numbers.exists() else {}

  def keep(name: str, row: dict[str, float]) -> None:
    found[name] = row
    numbers.write_text(json.dumps(found, indent=1))
    print(f'seed {seed}', name, row, flush=True)

  if not (folder / 'layers').exists():
    shallow(teacher, folder / 'layers')
  warm = folder / 'warm_student'
  run = partial(configured, teacher=teacher, seed=seed)
  if not warm.exists():
    method = distillation(part(divergences.forward_kl), of_teacher=True)
    config = run(str(folder / 'layers'), method=method, steps=warm_steps, rate=RATES['warm'])
    made = trained(config, str(folder / 'warm'))
    convert.export(*made, str(warm), source=str(folder / 'layers'))
  other = None
  for name, divergence in {'after the warm start': None, **TRAINED}.items():
    if name in found:
      continue
    method = distillation(divergence or part(divergences.forward_kl), of_teacher=False)
    config = run(str(warm), method=method, steps=steps, rate=RATES['train'])
    if divergence is None:
      experiment = build(config)
      params = init_params(experiment.policy, experiment.mesh, seed)
    else:
      experiment, params = trained(config, str(folder / name.replace(' ', '_').lower()))
    if other is None:
      policy = experiment.phases['train'].frozen['teacher']
      other = policy, init_params(policy, experiment.mesh, 0)
      own = sampled(*other, experiment, seed=10 * seed + 2)
      keep('the teacher itself', {'teacher NLL': nll(*other, own), 'distinct': distinct(own)})
    keep(name, measured(experiment, params, other, seed))
  return found


def summary(tables: list[Table]) -> str:
  """The table in Markdown: the mean of the seeds, and in brackets the least and the largest value."""
  columns = ('teacher NLL', 'student NLL', 'entropy', 'distinct')
  lines = ['| student | ' + ' | '.join(columns) + ' |', '|---' * 5 + '|']
  for name in tables[0]:
    cells = []
    for column in columns:
      values = [table[name][column] for table in tables if column in table[name]]
      spread = f'{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})' if values else ''
      cells.append(spread)
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--teacher', required=True, help='folder of SmolLM2-135M-Instruct')
  parser.add_argument('--folder', required=True, help='folder of the runs and of the tables')
  parser.add_argument('--warm', type=int, default=60, help='steps on samples of the teacher')
  parser.add_argument('--steps', type=int, default=40, help='steps on samples of the student')
  parser.add_argument('--seeds', default='0,1,2', help='seeds, with commas between them')
  args = parser.parse_args()
  out = pathlib.Path(args.folder)
  seeds = [int(seed) for seed in args.seeds.split(',')]
  print(
    summary([one_seed(args.teacher, out / f'seed{n}', n, args.warm, args.steps) for n in seeds])
  )


if __name__ == '__main__':
  main()
