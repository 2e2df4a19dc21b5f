"""Do published models fit published slices, and how does a step grow with the slice? Without a TPU.

    pip install 'jax[tpu]'
    python -m benchmarks.preflights             # all cases; resumes
    python -m benchmarks.preflights scale       # some of TABLES
    python -m benchmarks.preflights --table     # only writes the tables into docs/preflight.md
    python -m benchmarks.preflights --count     # compiles nothing: the table of what is counted by hand

Each program of each case is compiled by `polgrad.preflight` in a process for itself, and its numbers are
appended to docs/preflights.jsonl. A case is GRPO with one prompt of 8 completions a chip and step,
prompts of 512 tokens, completions of 1,536, and two minibatches. Parameters are cut over `fsdp`; `data`
copies are trained.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from benchmarks import marks
from polgrad import aot, build, preflight, sharding, speed
from polgrad.options import from_text

DOCS = pathlib.Path(__file__).parent.parent / 'docs'
RESULTS, PAGE = DOCS / 'preflights.jsonl', DOCS / 'preflight.md'
TRAINER, SAMPLER = ('update', 'anchor'), ('decode', 'prefill', 'rollout')


class Case(NamedTuple):
  """A model on a slice."""

  shape: str
  topology: str
  data: int
  fsdp: int
  sampler: str = (
    ''  # data and tensor of a `sampler_mesh` beside the chips that train, such as '8x4'
  )

  @property
  def key(self) -> list:
    return [
      self.shape,
      self.topology,
      self.data,
      self.fsdp,
      *([self.sampler] if self.sampler else []),
    ]

  @property
  def programs(self) -> tuple[str, ...]:
    return (*TRAINER, *SAMPLER, *(['transfer'] if self.sampler else []))


TABLES = {
  'models': (
    Case('qwen3_0_6b', 'v5e:4x4', 1, 16),
    Case('llama3_8b', 'v5e:16x16', 1, 256),
    Case('llama3_8b', 'v5p:4x4x4', 1, 64),
    Case('gemma3_27b', 'v5p:8x8x8', 8, 64),
    Case('qwen3_30b_a3b', 'v5p:4x4x8', 1, 128),
  ),
  'scale': (
    Case('llama3_8b', 'v5p:2x2x4', 1, 16),
    Case('llama3_8b', 'v5p:4x4x16', 16, 16),
    Case('llama3_8b', 'v5p:16x16x16', 256, 16),
  ),
  'apart': (Case('llama3_8b', 'v5p:4x4x4', 1, 32, sampler='8x4'),),
}


def settings(case: Case) -> list[str]:
  """The flags of a case."""
  chips = case.data * case.fsdp
  data, _, tensor = case.sampler.partition('x')
  beside = dict(name='sharding.beside', data=data, tensor=tensor) if case.sampler else {}
  return [
    '--config=experiments/run.py:method=grpo,task=addition,model=tiny',
    *('--only_phase=train', f'--topology={case.topology}', f'--shape={case.shape}'),
    *(f'--config.mesh.data={case.data}', f'--config.mesh.fsdp={case.fsdp}'),
    f'--config.phases.train.collect.prompts={chips}',
    f'--config.phases.warm_start.collect.rows={chips}',
    '--config.phases.train.collect.prompt_length=512',
    '--config.phases.train.collect.max_new_tokens=1536',
    *(f'--config.sampler_mesh.{name}={value}' for name, value in beside.items()),
  ]


def run(case: Case, program: str) -> dict:
  """The report of a program of a case, with the seconds of the whole command.

  Raises:
    RuntimeError: the command failed; has the end of what it said.
  """
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / 'out.json'
    started = time.perf_counter()
    done = subprocess.run(
      [
        *(sys.executable, '-m', 'polgrad.preflight', *settings(case)),
        *(f'--programs={program}', f'--out={out}'),
      ],
      cwd=DOCS.parent,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      capture_output=True,
      text=True,
    )
    if not out.exists():
      raise RuntimeError(f'{case}, {program}: {done.stderr[-2000:]}')
    found = json.loads(out.read_text())
    return {
      'case': case.key,
      'program': program,
      'wall_seconds': round(time.perf_counter() - started),
      'device': found['device'],
      'replicated': found['replicated'],
      **found['programs'][-1],
    }


def counted(case: Case) -> list[str]:
  """The cells of a case in the table of what is counted by hand; compiles nothing."""
  devices = aot.topology(case.topology)
  kind = devices[0].device_kind
  chip, peak = aot.CHIPS[kind], speed.peak_of(kind)
  config = preflight.shaped(from_text('method=grpo,task=addition,model=tiny'), case.shape)
  chips = case.data * case.fsdp
  config.mesh.update(data=case.data, fsdp=case.fsdp)
  config.phases.warm_start.collect.rows = chips
  collect = dict(prompts=chips, prompt_length=512, max_new_tokens=1536)
  config.phases.train.collect.update(collect)
  with sharding.compiling_for(devices):
    one = build.build(config)
  planned = {p.name.removeprefix('train '): p for p in aot.plan('train', one.phases['train'], one)}

  def bound(name: str) -> aot.Bound:
    counts = planned[name].counts
    # The compiled program is not known, so what moves is the least.
    program = aot.Program(
      name, 0.0, 0.0, compiled_flops=math.nan, collectives=[], seconds=0.0, **counts._asdict()
    )
    return aot.bound(program, chip, peak)

  seconds = {name: p.times * bound(name).seconds for name, p in planned.items()}
  sampling = seconds.pop('rollout')
  training = sum(seconds.values())
  gb = lambda name: f'{planned[name].counts.least_moved / 1e9:.1f}'
  limit = lambda name: f'{1e3 * bound(name).seconds:.0f} ({bound(name).limit})'
  state, caches = planned['update'].arguments[0], planned['decode'].arguments[2].caches
  return [
    str(chips),
    f'{case.data} x {case.fsdp}',
    f'{aot.local(state) / 2**30:.1f}',
    f'{aot.local(caches) / 2**30:.1f}',
    *(limit('update'), gb('update'), limit('decode'), gb('decode')),
    *(f'{sampling:.1f}', f'{training:.1f}', f'{sampling / training:.1f}'),
  ]


COUNTED = (
  *TABLES['scale'],
  Case('llama3_8b', 'v5p:4x4x16', 1, 256),
  Case('llama3_8b', 'v5p:16x16x16', 1, 4096),
)


def write_counted() -> None:
  """Writes the table of what is counted by hand."""
  head = [
    'chips', 'data x fsdp', 'state, GiB', 'cache, GiB', 'update, ms', 'moves, GB', 'decode step, ms',
    'moves, GB', 'a step: sampling, s', 'training, s', 'sampling / training',
  ]  # fmt: skip
  made = marks.table(head, map(counted, COUNTED))
  PAGE.write_text(marks.with_table(PAGE.read_text(), 'counted', made))


def read() -> dict[tuple, dict]:
  """The last result of every program: {(shape, topology, data, fsdp, program): report}."""
  return {(*row['case'], row['program']): row for row in marks.read(RESULTS)}


def table(found: dict[tuple, dict], name: str) -> str:
  """A table, a row a case."""
  head = [
    'model', 'slice', 'data x fsdp', 'update: GiB, left', 'of it temporary', 'rollout: GiB, left',
    'update, ms', 'MFU <=', 'moved / least, GB', 'decode step, ms', 'moved / least, GB',
    'a step: sampling, s', 'training, s', 'compiled in, s',
  ]  # fmt: skip
  got = lambda case: {program: found.get((*case.key, program)) for program in case.programs}
  return marks.table(head, [cells(case, got(case)) for case in TABLES[name]])


def cells(case: Case, got: dict[str, dict | None]) -> list[str]:
  """The cells of a case; empty where a program was not compiled."""
  gib = lambda x: f'{x / 2**30:.1f}'
  pick = lambda name, text: text(got[name]) if got[name] else ''
  held = lambda row: f'{gib(row["memory"])}, {gib(row["headroom"])}'
  moved = lambda row: f'{row["moved"] / 1e9:.3g} / {row["least_moved"] / 1e9:.3g}'
  ms = lambda row: f'{1e3 * row["roofline_seconds"]:.0f} ({row["limit"]})'
  total = lambda names: sum(got[n]['times'] * got[n]['roofline_seconds'] for n in names)
  trained = all(got[name] for name in TRAINER)
  # What a rollout moves is counted in its parts.
  sampled = rollout_seconds(got.get('transfer'), got['prefill'], got['decode'])
  done = [row['seconds'] for row in got.values() if row]
  return [
    f'`{case.shape}`',
    case.topology,
    f'{case.data} x {case.fsdp}' + (f', sampler {case.sampler}' if case.sampler else ''),
    pick('update', held),
    pick('update', lambda row: gib(row['temporary'])),
    pick('rollout', held),
    pick('update', ms),
    pick('update', lambda row: f'{row["mfu_bound"]:.0%}'),
    pick('update', moved),
    pick('decode', ms),
    pick('decode', moved),
    f'{sampled:.1f}' if sampled else '',
    f'{total(TRAINER):.2f}' if trained else '',
    f'{sum(done):.0f}' if len(done) == len(got) else '',
  ]


def rollout_seconds(
  transfer: dict | None, prefill: dict | None, decode: dict | None, draws: int = 1536
) -> float:
  """The bound of a rollout from those of its prefill and its decoding steps; 0 if one is missing.

  With chips that only sample, it begins with the transfer of the parameters.
  """
  if not (prefill and decode):
    return 0.0
  copied = transfer['roofline_seconds'] if transfer else 0.0
  return copied + prefill['roofline_seconds'] + draws * decode['roofline_seconds']


def write(found: dict[tuple, dict]) -> None:
  """Writes the tables into the page."""
  text = PAGE.read_text()
  for name in TABLES:
    text = marks.with_table(text, name, table(found, name))
  PAGE.write_text(text)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('tables', nargs='*', metavar='TABLE', help=', '.join(TABLES))
  parser.add_argument('--table', action='store_true', help='only write the tables')
  parser.add_argument('--count', action='store_true', help='only what is counted by hand')
  args = parser.parse_args()
  if args.count:
    return write_counted()
  if unknown := sorted({*args.tables} - TABLES.keys()):
    parser.error(f'unknown {unknown[0]!r}; there is {", ".join(TABLES)}')
  wanted = [one for table in args.tables or TABLES for one in TABLES[table]]
  for name in (*TRAINER, *SAMPLER, 'transfer'):
    for case in wanted if not args.table else ():
      if name not in case.programs or (*case.key, name) in read():
        continue
      try:
        row = run(case, name)
      except RuntimeError as error:
        print(error, file=sys.stderr)
        continue
      marks.append(RESULTS, row)
      print(
        f'{case.shape} on {case.topology}, {name}: {row["verdict"]}, {row["wall_seconds"]} s',
        flush=True,
      )
  write(read())


if __name__ == '__main__':
  main()
