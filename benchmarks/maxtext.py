"""polgrad's supervised update beside MaxText's train step, compiled for TPUs that are not there.

    python3.13 -m venv /tmp/maxtext && /tmp/maxtext/bin/pip install 'maxtext[tpu]==0.2.5'
    python -m benchmarks.maxtext --python=/tmp/maxtext/bin/python    # all cases; resumes
    python -m benchmarks.maxtext --table    # only the table in docs/preflight.md

One row of 4,096 tokens a chip, every layer recomputed, float32 parameters and AdamW, bfloat16
activations, parameters cut over all chips. MaxText runs with its defaults and with the vocabulary in 8
tiles. Memory is the compiler's count; operations and bytes are counted by `polgrad.hlo` in the text of
both programs, loop bodies times their trips. Results are appended to docs/maxtext.jsonl.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks import marks
from polgrad import hlo

DOCS = pathlib.Path(__file__).parent.parent / 'docs'
RESULTS, PAGE = DOCS / 'maxtext.jsonl', DOCS / 'preflight.md'
WORKER = pathlib.Path(__file__).parent / 'peers/maxtext_worker.py'
LENGTH = 4096


class Case(NamedTuple):
  """A model on a slice, with its names in both programs."""

  shape: str
  topology: str
  chips: int
  model_name: str
  compile_topology: str


CASES = (
  Case('qwen3_0_6b', 'v5e:4x4', 16, 'qwen3-0.6b', 'v5e-16'),
  Case('llama3_8b', 'v5p:4x4x4', 64, 'llama3-8b', 'v5p-128'),
  Case('gemma3_27b', 'v5p:4x4x8', 128, 'gemma3-27b', 'v5p-256'),
)
MAXTEXT = {'MaxText': [], 'MaxText, 8 tiles': ['num_vocab_tiling=8']}


def maxtext(case: Case, settings: list[str], python: str, folder: pathlib.Path) -> dict:
  """The counts of MaxText's train step."""
  find = (
    'import maxtext, pathlib; print(pathlib.Path(maxtext.__file__).parent / "configs/base.yml")'
  )
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1'}
  environment.pop('PYTHONPATH', None)
  start = dict(env=environment, capture_output=True, text=True, cwd=folder)
  config = subprocess.run([python, '-c', find], **start).stdout.strip()
  done = subprocess.run(
    [
      *(python, str(WORKER), str(folder), config),
      *(f'compile_topology={case.compile_topology}', 'compile_topology_num_slices=1'),
      *(f'model_name={case.model_name}', f'max_target_length={LENGTH}', 'per_device_batch_size=1'),
      *('remat_policy=full', 'dtype=bfloat16', 'weight_dtype=float32', 'ici_fsdp_parallelism=-1'),
      *(
        'enable_checkpointing=false',
        'dataset_type=synthetic',
        'run_name=compile',
        'opt_type=adamw',
      ),
      *(f'base_output_directory={folder}', *settings),
    ],
    **start,
  )
  if not (folder / 'memory.json').exists():
    raise RuntimeError(done.stderr[-3000:])
  memory = json.loads((folder / 'memory.json').read_text())
  text = (folder / 'program.txt').read_text()
  return memory | counts(hlo.product_flops(text), hlo.collectives(text, {'chips': case.chips}))


def polgrad(case: Case, python: str, folder: pathlib.Path) -> dict:
  """The same of polgrad's update, by the same Python, so that one compiler makes both."""
  out = folder / 'report.json'
  done = subprocess.run(
    [
      *(python, '-m', 'polgrad.preflight'),
      '--config=experiments/run.py:method=sft,task=addition,model=tiny',
      *('--only_phase=train', '--programs=update', f'--out={out}'),
      *(f'--topology={case.topology}', f'--shape={case.shape}'),
      *('--config.mesh.data=1', f'--config.mesh.fsdp={case.chips}'),
      f'--config.phases.train.collect.length={LENGTH}',
      f'--config.phases.train.collect.rows={case.chips}',
    ],
    cwd=DOCS.parent,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(DOCS.parent)},
    capture_output=True,
    text=True,
  )
  if not out.exists():
    raise RuntimeError(done.stderr[-3000:])
  report = json.loads(out.read_text())
  [row] = report['programs']
  moved = [hlo.Collective(**one) for one in row['collectives']]
  return {
    'arguments': row['memory'] - row['temporary'],
    'temporary': row['temporary'],
    'held': row['memory'],
    'least_moved': row['least_moved'],
    'jax': report['jax'],
    **counts(row['compiled_flops'], moved),
  }


def counts(flops: float, collectives: list[hlo.Collective]) -> dict:
  kinds = {}
  for one in collectives:
    kinds[one.kind] = kinds.get(one.kind, 0) + one.moved
  return {'flops': flops, 'moved': sum(kinds.values()), 'kinds': kinds}


def read() -> dict[tuple[str, str], dict]:
  return {(row['shape'], row['program']): row for row in marks.read(RESULTS)}


def rows(found: dict[tuple[str, str], dict]) -> Iterator[str]:
  """The lines of the table."""
  yield '| model | slice | program | state, GB | temporary, GB | TFLOP | moved, GB | of it |'
  yield '|---|---|---|---|---|---|---|---|'
  gb = lambda x: f'{x / 1e9:.2f}'
  for case in CASES:
    for name in ('polgrad', *MAXTEXT):
      if one := found.get((case.shape, name)):
        kinds = sorted(one['kinds'].items(), key=lambda item: -item[1])
        told = ', '.join(f'{kind} {gb(moved)}' for kind, moved in kinds if moved > 5e6)
        yield (
          f'| `{case.shape}` | {case.topology} | {name} | {gb(one["arguments"])} | '
          f'{gb(one["temporary"])} | {one["flops"] / 1e12:.1f} | {gb(one["moved"])} | {told} |'
        )


def write(found: dict[tuple[str, str], dict]) -> None:
  PAGE.write_text(marks.with_table(PAGE.read_text(), 'maxtext', '\n'.join(rows(found))))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--python', help='a Python that has MaxText')
  parser.add_argument('--table', action='store_true', help='only write the table')
  args = parser.parse_args()
  if not (args.table or args.python):
    parser.error('--python=PATH: a Python that has MaxText; its docstring says how to make one')
  for case in () if args.table else CASES:
    for name in ('polgrad', *MAXTEXT):
      if (case.shape, name) in read():
        continue
      started = time.perf_counter()
      with tempfile.TemporaryDirectory() as path:
        folder = pathlib.Path(path)
        ours = name == 'polgrad'
        try:
          run = polgrad if ours else functools.partial(maxtext, settings=MAXTEXT[name])
          row = run(case, python=args.python, folder=folder)
        except RuntimeError as error:
          print(f'{case.shape}, {name}: {error}', file=sys.stderr)
          continue
      row |= dict(shape=case.shape, program=name, seconds=round(time.perf_counter() - started))
      marks.append(RESULTS, row)
      print(f'{case.shape}, {name}: {row["seconds"]} s', flush=True)
  write(read())


if __name__ == '__main__':
  main()
