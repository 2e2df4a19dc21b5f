"""polgrad, Tunix, TRL and vLLM in turn on the same work: seconds of rollout, reference, update and step.

    python -m benchmarks.compare                    # all kinds, three rounds; writes compare.md
    python -m benchmarks.compare --kinds grpo --rounds=5
    python -m benchmarks.compare --kinds rollout16 rollout128 --page=''  # only prints

Each framework runs in an environment of its own (made below `--folder` on the first call, with the
checkpoint of SmolLM2) and in a fresh process a round, one after the other, on one folder: a random
Qwen3 of four layers or SmolLM2-135M, and token ids. Of rollouts alone vLLM is the peer. The machine is
shared and noisy, so look at the ratios: each is of two neighbours in one round. A run is refused if
the frameworks did not do the same work.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as kinds

from polgrad import models
from polgrad.models import hf

sys.path.append(str(pathlib.Path(__file__).parent.parent / 'launch'))
import vllm_cpu

HERE = pathlib.Path(__file__).parent
PEERS = {'tunix': ['google-tunix==0.1.7'], 'trl': ['torch==2.13.*', 'trl==1.16.0']}
MODEL = dict(
  vocab_size=1024, num_layers=4, width=256, num_heads=8, num_kv_heads=4, head_dim=32, mlp_width=768,
  qk_norm='head', max_length=512, rope_theta=1e6,
)  # fmt: skip
TRAINING = dict(beta=0.04, dpo_beta=0.1, learning_rate=1e-6, new_tokens=64)


class Kind(NamedTuple):
  """A workload: its title, what workers call it, and who takes part."""

  title: str
  worker: str
  model: str = 'tiny'
  prompts: int = 8
  samples: int = 8
  steps: int = 8
  frameworks: tuple[str, ...] = ('polgrad', 'tunix', 'trl')
  # Of rollouts alone:
  dtype: str = 'float32'
  new_tokens: int = 64  # of the longest completion
  mean: int = (
    0  # tokens of a completion, which then ends with probability 1 / mean at each; 0: none ends
  )
  at_once: int = 0  # rows that are decoded at a time; 0: all


def rollout(title: str, prompts: int, **others) -> Kind:
  """A kind that samples with SmolLM2, four completions of each prompt, and trains nothing."""
  title = f'Rollout, SmolLM2-135M, {title}'
  both = dict(model='smollm2', samples=4, frameworks=('polgrad', 'vllm'))
  return Kind(title, 'rollout', prompts=prompts, **both, **others)


KINDS = {
  'grpo': Kind('GRPO, tiny Qwen3, 8 prompts x 8 samples, 32 + 64 tokens', 'grpo'),
  'dpo': Kind('DPO, tiny Qwen3, 16 pairs of 96 tokens', 'dpo'),
  'sft': Kind('SFT, tiny Qwen3, 64 rows of 96 tokens', 'sft'),
  'smollm2': Kind(
    'GRPO, SmolLM2-135M, 4 prompts x 4 samples, 32 + 64 tokens',
    'grpo',
    model='smollm2',
    prompts=4,
    samples=4,
    steps=4,
    frameworks=('polgrad', 'trl'),  # the worker of Tunix builds a Qwen3 alone
  ),
  'rollout16': rollout('16 rows, 32 + 64 tokens, float32', 4, steps=5),
  'rollout16_bf16': rollout('16 rows, 32 + 64 tokens, bfloat16', 4, steps=5, dtype='bfloat16'),
  'rollout128': rollout('128 rows, 32 + 64 tokens, float32', 32, steps=3),
  'rollout128_bf16': rollout('128 rows, 32 + 64 tokens, bfloat16', 32, steps=3, dtype='bfloat16'),
  'rollout_tail': rollout(
    '64 rows of mean length 64, at most 256, 16 at a time, float32',
    *(16,),
    **dict(steps=3, new_tokens=256, mean=64, at_once=16),
  ),
}
# For every framework: memory comes in large pages, and what a step has freed is kept for the next one,
# in place of pages that the kernel zeroes anew. XLA allocates buffers at every step.
MALLOC = {'hugetlb': 1, 'arena_max': 1, 'mmap_threshold': 2**34, 'trim_threshold': 2**34}
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'HF_HUB_OFFLINE': '1',
  'GLIBC_TUNABLES': ':'.join(f'glibc.malloc.{name}={value}' for name, value in MALLOC.items()),
}
PARTS = ('rollout', 'reference', 'update', 'step', 'cpu')  # cpu: CPU seconds of a rollout alone


def write_work(folder: pathlib.Path, kind: Kind, checkpoint: pathlib.Path) -> None:
  """The model, a tokenizer of words t0, t1, ..., and token ids; all frameworks read these."""
  policy = (
    models.pretrained(path=str(checkpoint)) if kind.model == 'smollm2' else models.decoder(**MODEL)
  )
  vocabulary = policy.config.vocab_size
  hf.save(folder / 'model', policy.config, policy.init(jax.random.key(0)))
  # The stop token lies outside the model's vocabulary: all completions have the full length.
  words = {f't{i}': i for i in range(vocabulary)} | {'</s>': vocabulary}
  tokenizer = Tokenizer(kinds.WordLevel(words, unk_token='t0'))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens(['</s>'])
  tokenizer.save(str(folder / 'model' / 'tokenizer.json'))
  names = dict(tokenizer_class='PreTrainedTokenizerFast', eos_token='</s>', pad_token='t0')
  (folder / 'model' / 'tokenizer_config.json').write_text(json.dumps(names))
  random = np.random.default_rng(0)
  ids = lambda *shape: random.integers(1, vocabulary, shape)
  data = dict(prompts=ids(kind.prompts, 32), sft=ids(64, 96))
  data |= dict(chosen=ids(16, 96), rejected=ids(16, 96))
  data['rejected'][:, :32] = data['chosen'][:, :32]
  data = {name: x.tolist() for name, x in data.items()}
  (folder / 'data.json').write_text(json.dumps(data | {'prompt_length': 32}))
  load = TRAINING | dict(steps=kind.steps, samples=kind.samples, vocabulary=vocabulary)
  load |= dict(dtype=kind.dtype, new_tokens=kind.new_tokens, mean=kind.mean, at_once=kind.at_once)
  (folder / 'workload.json').write_text(json.dumps(load))


def interpreter(name: str, folder: pathlib.Path) -> str:
  """The Python of a framework; its environment is made if it is not there."""
  if name == 'polgrad':
    return sys.executable
  if name == 'vllm':
    return str(vllm_cpu.make(folder / name))
  python = folder / name / 'bin' / 'python'
  if not python.exists():
    print(f'making {python.parent.parent}', flush=True)
    subprocess.run([sys.executable, '-m', 'venv', str(folder / name)], check=True)
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', *PEERS[name]], check=True)
  return str(python)


def measure(name: str, kind: str, work: pathlib.Path, folder: pathlib.Path) -> dict:
  """One process of a framework; the JSON of its last line."""
  if name == 'polgrad':
    program = ['-m', 'benchmarks.peers.polgrad_worker']
  else:
    program = [str(HERE / 'peers' / f'{name}_worker.py')]
  done = subprocess.run(
    [interpreter(name, folder), *program, str(work), kind],
    cwd=HERE.parent,
    env=os.environ | ENVIRONMENT,
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
    ValueError: numbers of tokens differ, or losses and gradients that have one definition. GRPO's
      depend on what was sampled.
  """
  tokens = {name: row['tokens'] for name, row in rows.items()}
  if len(set(tokens.values())) != 1:
    raise ValueError(f'{kind}: tokens of a step differ: {tokens}')
  if KINDS[kind].worker in ('grpo', 'rollout'):
    return
  losses = {name: row['loss'] for name, row in rows.items()}
  if max(losses.values()) - min(losses.values()) > 1e-3:
    raise ValueError(f'{kind}: losses of the first step differ: {losses}')
  norms = {name: row['grad_norm'] for name, row in rows.items()}
  if max(norms.values()) > 1.001 * min(norms.values()):
    raise ValueError(f'{kind}: gradient norms of the first step differ: {norms}')


def table(kind: str, rounds: list[dict[str, dict]]) -> list[str]:
  """Medians of all steps, and ratios to polgrad by round: median (least to largest)."""
  names = list(rounds[0])
  lines = [f'| {KINDS[kind].title} | ' + ' | '.join(names) + ' |', '|---' * (len(names) + 1) + '|']
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
      told = f'{seconds:.3f} s, {rounds[0][name]["tokens"] / seconds:.0f} tokens/s'
      cells.append(told if name == 'polgrad' else f'{told}, {spread}')
    lines.append(f'| {part} | ' + ' | '.join(cells) + ' |')
  whole = 'step' if KINDS[kind].worker != 'rollout' else 'rollout'
  compiling = lambda n: statistics.median(
    r[n]['first'][whole] - middle(r[n], whole) for r in rounds
  )
  lines.append(
    '| first step less a later one | ' + ' | '.join(f'{compiling(n):.1f} s' for n in names) + ' |'
  )
  peak = lambda n: statistics.median(r[n]['peak_mib'] for r in rounds)
  lines.append(
    '| peak memory of the process | ' + ' | '.join(f'{peak(n):.0f} MiB' for n in names) + ' |'
  )
  return [*lines, '']


def compare(kind: str, rounds: int, folder: pathlib.Path, rates: list) -> list[dict[str, dict]]:
  """The records of all rounds; `rates` takes the rate of products before each."""
  work_of, results = KINDS[kind], []
  with tempfile.TemporaryDirectory() as place:
    work = pathlib.Path(place)
    write_work(work, work_of, folder / 'smollm2')
    for _ in range(rounds):
      rates.append(matmul_rate())
      rows = {n: measure(n, work_of.worker, work, folder) for n in work_of.frameworks}
      check_same_work(kind, rows)
      results.append(rows)
      last = 'rollout' if work_of.worker == 'rollout' else 'step'
      print(kind, {n: round(statistics.median(r['seconds'][last]), 3) for n, r in rows.items()})
  return results


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kinds', nargs='*', default=list(KINDS), choices=list(KINDS))
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument(
    '--folder', type=pathlib.Path, default=pathlib.Path('~/.cache/polgrad/peers').expanduser()
  )
  parser.add_argument('--page', default=str(HERE / 'compare.md'), help="'' writes none")
  arguments = parser.parse_args()
  checkpoint = arguments.folder / 'smollm2'
  real = any(KINDS[kind].model == 'smollm2' for kind in arguments.kinds)
  if real and not checkpoint.exists():
    fetch = HERE.parent / 'launch' / 'fetch_smollm2.py'
    subprocess.run([sys.executable, str(fetch), str(checkpoint)], check=True)
  rates = []
  results = {k: compare(k, arguments.rounds, arguments.folder, rates) for k in arguments.kinds}
  low, middle, high = min(rates), statistics.median(rates), max(rates)
  names = {'tunix': 'Tunix', 'trl': 'TRL', 'vllm': 'vLLM'}
  there = [x for n, x in names.items() if any(n in KINDS[k].frameworks for k in results)]
  lines = [
    f'# polgrad beside {", ".join(there)} on the same work',
    '',
    f'`python -m benchmarks.compare`, {datetime.date.today()}: medians of {arguments.rounds} rounds of '
    'one process each, of the steps',
    'after the first; ratios are to polgrad in the same round, median (least to largest): above 1 '
    'polgrad is faster.',
    f'float32 products of 1536 x 1536 ran at {middle:.0f} GFLOP/s in between ({low:.0f} to {high:.0f}).',
    '',
  ]
  for kind, rounds in results.items():
    lines += table(kind, rounds)
  if arguments.page:
    pathlib.Path(arguments.page).write_text('\n'.join(lines).rstrip() + '\n')
  print('\n'.join(lines))


if __name__ == '__main__':
  main()
