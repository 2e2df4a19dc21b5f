"""polgrad, Tunix and TRL in turn on the same work: seconds of rollout, reference, update and step.

    python -m benchmarks.compare                    # all kinds, three rounds; writes compare.md
    python -m benchmarks.compare --kinds=grpo --rounds=5

Each framework runs in an environment of its own (made below `--environments` on the first call) and
in a fresh process a round, one after the other, on one folder: a random Qwen3 of four layers, and
token ids. The machine is shared and noisy, so look at the ratios: each is of two neighbours in one
round. A run is refused if the frameworks did not do the same work.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as kinds

from polgrad import models
from polgrad.models import hf

HERE = pathlib.Path(__file__).parent
PEERS = {'tunix': ['google-tunix==0.1.7'], 'trl': ['torch==2.13.*', 'trl==1.16.0']}
MODEL = dict(
  vocab_size=1024, num_layers=4, width=256, num_heads=8, num_kv_heads=4, head_dim=32, mlp_width=768,
  qk_norm='head', max_length=512, rope_theta=1e6,
)  # fmt: skip
WORKLOAD = dict(steps=8, samples=8, new_tokens=64, beta=0.04, dpo_beta=0.1, learning_rate=1e-6)
PARTS = ('rollout', 'reference', 'update', 'step')


def write_work(folder: pathlib.Path) -> None:
  """The model, a tokenizer of words t0 ... t1023, and token ids; all frameworks read these."""
  policy = models.decoder(**MODEL)
  hf.save(folder / 'model', policy.config, policy.init(jax.random.key(0)))
  # The stop token lies outside the model's vocabulary: all completions have the full length.
  vocabulary = {f't{i}': i for i in range(1024)} | {'</s>': 1024}
  tokenizer = Tokenizer(kinds.WordLevel(vocabulary, unk_token='t0'))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens(['</s>'])
  tokenizer.save(str(folder / 'model' / 'tokenizer.json'))
  names = dict(tokenizer_class='PreTrainedTokenizerFast', eos_token='</s>', pad_token='t0')
  (folder / 'model' / 'tokenizer_config.json').write_text(json.dumps(names))
  random = np.random.default_rng(0)
  ids = lambda *shape: random.integers(1, 1024, shape)
  prompts, chosen, rejected = ids(8, 32), ids(16, 96), ids(16, 96)
  rejected[:, :32] = chosen[:, :32]
  data = dict(prompts=prompts, sft=ids(64, 96), chosen=chosen, rejected=rejected)
  data = {name: x.tolist() for name, x in data.items()} | {'prompt_length': 32}
  (folder / 'data.json').write_text(json.dumps(data))
  (folder / 'workload.json').write_text(json.dumps(WORKLOAD))


def interpreter(name: str, environments: pathlib.Path) -> str:
  """The Python of a framework; its environment is made if it is not there."""
  if name == 'polgrad':
    return sys.executable
  python = environments / name / 'bin' / 'python'
  if not python.exists():
    print(f'making {python.parent.parent}', flush=True)
    subprocess.run([sys.executable, '-m', 'venv', str(environments / name)], check=True)
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', *PEERS[name]], check=True)
  return str(python)


def measure(name: str, kind: str, folder: pathlib.Path, environments: pathlib.Path) -> dict:
  """One process of a framework; the JSON of its last line."""
  if name == 'polgrad':
    program = ['-m', 'benchmarks.peers.polgrad_worker']
  else:
    program = [str(HERE / 'peers' / f'{name}_worker.py')]
  done = subprocess.run(
    [interpreter(name, environments), *program, str(folder), kind],
    cwd=HERE.parent,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1'},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def matmul_rate(size: int = 1536, repeats: int = 9) -> float:
  """GFLOP/s of a float32 product in JAX, the median: what the machine gives at this time."""
  x = jnp.ones((size, size))
  product = jax.jit(jnp.matmul)
  product(x, x).block_until_ready()
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    product(x, x).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2e-9 * size**3 / statistics.median(seconds)


def check_same_work(kind: str, rows: dict[str, dict]) -> None:
  """Refuses a comparison of unequal work.

  Raises:
    ValueError: numbers of tokens, or losses that have one definition, differ.
  """
  tokens = {name: row['tokens'] for name, row in rows.items()}
  if len(set(tokens.values())) != 1:
    raise ValueError(f'{kind}: tokens of a step differ: {tokens}')
  losses = {name: row['loss'] for name, row in rows.items()}
  if kind != 'grpo' and max(losses.values()) - min(losses.values()) > 1e-3:
    raise ValueError(f'{kind}: losses of the first step differ: {losses}')


def table(kind: str, rounds: list[dict[str, dict]]) -> list[str]:
  """Medians of all steps, and ratios to polgrad by round: median (least to largest)."""
  names = list(rounds[0])
  lines = [f'| {kind} | ' + ' | '.join(names) + ' |', '|---' * (len(names) + 1) + '|']
  middle = lambda row, part: statistics.median(row['seconds'][part])
  for part in PARTS:
    having = [n for n in names if all(part in r[n]['seconds'] for r in rounds)]
    if 'polgrad' not in having:
      continue
    cells = []
    for name in names:
      if name not in having:
        cells.append('')
        continue
      seconds = statistics.median(middle(r[name], part) for r in rounds)
      ratios = [middle(r[name], part) / middle(r['polgrad'], part) for r in rounds]
      spread = f'{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})'
      cells.append(f'{seconds:.3f} s' + ('' if name == 'polgrad' else f', {spread}'))
    lines.append(f'| {part} | ' + ' | '.join(cells) + ' |')
  first = lambda n: statistics.median(r[n]['first']['step'] for r in rounds)
  lines.append(
    '| first step, with compilation | ' + ' | '.join(f'{first(n):.1f} s' for n in names) + ' |'
  )
  rate = lambda n: statistics.median(r[n]['tokens'] / middle(r[n], 'step') for r in rounds)
  lines.append('| tokens/s of the step | ' + ' | '.join(f'{rate(n):.0f}' for n in names) + ' |')
  peak = lambda n: statistics.median(r[n]['peak_mib'] for r in rounds)
  lines.append(
    '| peak memory of the process | ' + ' | '.join(f'{peak(n):.0f} MiB' for n in names) + ' |'
  )
  return [*lines, '']


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kinds', nargs='*', default=['grpo', 'dpo', 'sft'])
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--frameworks', nargs='*', default=['polgrad', *PEERS])
  cache = pathlib.Path('~/.cache/polgrad/peers').expanduser()
  parser.add_argument('--environments', type=pathlib.Path, default=cache)
  arguments = parser.parse_args()
  results, rates = {}, []
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_work(folder)
    for kind in arguments.kinds:
      results[kind] = []
      for _ in range(arguments.rounds):
        rates.append(matmul_rate())
        rows = {n: measure(n, kind, folder, arguments.environments) for n in arguments.frameworks}
        check_same_work(kind, rows)
        results[kind].append(rows)
        print(kind, {n: round(statistics.median(r['seconds']['step']), 3) for n, r in rows.items()})
  low, middle, high = min(rates), statistics.median(rates), max(rates)
  lines = [
    '# polgrad, Tunix and TRL on the same work',
    '',
    f'`python -m benchmarks.compare`: medians of {arguments.rounds} rounds of one process each, of '
    f'{WORKLOAD["steps"] - 1} steps after the first; ratios',
    'are to polgrad in the same round, median (least to largest): above 1 polgrad is faster.',
    f'float32 products ran at {middle:.0f} GFLOP/s meanwhile ({low:.0f} to {high:.0f}).',
    '',
  ]
  for kind, rounds in results.items():
    lines += table(kind, rounds)
  (HERE / 'compare.md').write_text('\n'.join(lines).rstrip() + '\n')
  print('\n'.join(lines))


if __name__ == '__main__':
  main()
