"""Compiles the programs of a run for a TPU topology that is not there, and says whether they fit it.

    pip install 'jax[tpu]'
    python -m polgrad.preflight --config=experiments/run.py:method=grpo,task=addition,model=tiny \\
      --topology=v5e:4x4 --shape=qwen3_0_6b --config.mesh.fsdp=16 --config.mesh.data=1

Nothing runs, and no weights are needed. Of every phase it compiles the update, the log-probs of an
anchor, the rollout, and its prefill and one step of its decoding alone. It reports for a chip: memory by
the compiler's count, operations and bytes counted by hand, the least time that these take, and
collectives counted in the compiled program. Exit code 1: a program does not fit into memory.
docs/preflight.md explains the numbers.
"""

import json
import os
import sys
from typing import Any

import jax
from absl import flags

from polgrad import aot, build, cli, models, sharding, speed
from polgrad.aot import CHIPS, Chip, Program, bound
from polgrad.checks import tables
from polgrad.registry import part, suggest
from polgrad.sampling import engines

_TOPOLOGY = flags.DEFINE_string('topology', 'v5e:4x4', 'Generation and shape of the slice.')
_SHAPE = flags.DEFINE_string(
  'shape', '', 'Sizes of a published model that take the place of config.model, see SHAPES.'
)

_PHASE = flags.DEFINE_string('only_phase', '', 'The only phase to compile; "": all phases.')
_PROGRAMS = flags.DEFINE_list(
  'programs', [], 'The only programs to compile, such as update,rollout; none: all.'
)


_QWEN3 = dict(vocab_size=151_936, head_dim=128, qk_norm='head', rope_theta=1e6)
# Sizes in the config.json of published models; weights are not needed.
SHAPES = {
  'qwen3_0_6b': _QWEN3 | dict(num_layers=28, width=1024, num_heads=16, num_kv_heads=8, mlp_width=3072),
  'llama3_8b': dict(
    vocab_size=128_256, num_layers=32, width=4096, num_heads=32, num_kv_heads=8, head_dim=128,
    mlp_width=14_336, rope_theta=5e5, tie_embeddings=False,
  ),
  'gemma3_27b': dict(
    vocab_size=262_208, num_layers=62, width=5376, num_heads=32, num_kv_heads=16, head_dim=128,
    mlp_width=21_504, activation='gelu', qk_norm='head', rope_theta=1e6, rope_factor=8.0, window=1024,
    local_layers=tuple(i for i in range(62) if i % 6 != 5), norm_offset=1.0, post_norm=True,
    query_scale=168**-0.5, embedding_scale=5376**0.5,
  ),
  'qwen3_30b_a3b': _QWEN3 | dict(
    num_layers=48, width=2048, num_heads=32, num_kv_heads=4, mlp_width=768, num_experts=128,
    experts_per_token=8, tie_embeddings=False,
  ),
}  # fmt: skip


def verdict(program: Program, chip: Chip, peak: float) -> str:
  """Whether a program fits, and which knob to turn."""
  if program.error or program.memory > chip.memory:
    arguments = program.memory - program.temporary
    if not program.error and arguments > chip.memory / 2:
      return 'does not fit: the state is large; raise config.mesh.fsdp'
    knobs = {'decode': 'collect.slots', 'prefill': 'fewer records a step'}
    knob = knobs.get(program.name.rpartition(' ')[2], 'more micro_batches, or remat=full')
    return f'does not fit: {knob}'
  if program.name.endswith(' transfer'):
    return (
      'fits' if program.moved <= program.least_moved else 'fits; config.engine.dtype moves less'
    )
  limit = bound(program, chip, peak).limit
  knobs = {
    'products': 'fits',
    'memory': 'fits; memory limits: more rows a chip',
    'links': 'fits; links limit: more rows a chip, or less of mesh.fsdp and mesh.tensor',
  }
  return knobs[limit]


def report(run: build.Experiment, found: list[Program], kind: str) -> dict[str, Any]:
  """The numbers of all programs as JSON."""
  chip, peak = CHIPS[kind], speed.peak_of(kind)
  rows = []
  for one in found:
    least = bound(one, chip, peak)
    rows.append(
      one._asdict()
      | dict(
        collectives=[c._asdict() for c in one.collectives],
        moved=one.moved,
        headroom=chip.memory - one.memory,
        roofline_seconds=least.seconds,
        limit=least.limit,
        mfu_bound=least.mfu,
        verdict=verdict(one, chip, peak),
      )
    )
  apart = run.sampled_on is not run.mesh
  return dict(
    device=kind,
    jax=jax.__version__,
    mesh=sharding.sizes_of(run.mesh),
    sampler_mesh=dict(run.sampled_on.shape) if apart else {},
    engine=type(run.engine).__name__ if isinstance(run.engine, engines.External) else '',
    replicated=aot.replicated(run.mesh, aot.placed_params(run.policy, run.mesh)),
    programs=rows,
    step=step(rows, apart),
  )


def step(rows: list[dict[str, Any]], apart: bool) -> dict[str, float]:
  """Bounds of the seconds that sampling and training take in a step, and of the whole.

  >>> rows = [dict(name='train rollout', times=1, roofline_seconds=3.0),
  ...         dict(name='train update', times=2, roofline_seconds=1.0)]
  >>> step(rows, apart=True)
  {'sampling': 3.0, 'training': 2.0, 'seconds': 3.0, 'trainer_waits': 0.333, 'sampler_waits': 0.0}

  Args:
    apart: whether other chips sample than those that train, at the same time.
  """
  samples = lambda row: row['name'].endswith((' rollout', ' transfer'))
  total = lambda kind: sum(
    row['times'] * row['roofline_seconds'] for row in rows if samples(row) == kind
  )
  sampling, training = total(True), total(False)
  seconds = max(sampling, training) if apart else sampling + training
  found = dict(sampling=sampling, training=training, seconds=seconds)
  if apart and seconds:
    found['trainer_waits'] = round(1 - training / seconds, 3)
    found['sampler_waits'] = round(1 - sampling / seconds, 3)
  return found


def lines(found: dict[str, Any]) -> list[str]:
  """The report as text."""
  gib = lambda x: f'{x / 2**30:.2f}'
  head = ('program', 'GiB', 'left', 'temporary', 'TFLOP', 'in HLO', 'GB', 'ms', 'limit', 'MFU <=')
  text = tables.table(
    head,
    [
      (r['name'], gib(r['memory']), gib(r['headroom']), gib(r['temporary']), f'{r["flops"] / 1e12:.3f}',
       f'{r["compiled_flops"] / 1e12:.3f}', f'{r["bytes"] / 1e9:.2f}',
       f'{1e3 * r["roofline_seconds"]:.2f}', r['limit'], f'{r["mfu_bound"]:.0%}')
      for r in found['programs']
    ],
  )  # fmt: skip
  rows = [
    (r['name'], c['kind'], c['axes'], c['count'], f'{c["moved"] / 1e9:.3f}')
    for r in found['programs']
    for c in r['collectives']
  ]
  text += ['', *tables.table(('program', 'collective', 'axes', 'times', 'GB a chip'), rows)]
  text.append('')
  for r in found['programs']:
    text.append(
      f'  {r["name"]}: moves {r["moved"] / 1e9:.3f} GB, the least is {r["least_moved"] / 1e9:.3f}; '
      f'{r["verdict"]} (compiled in {r["seconds"]:.0f} s)'
    )
    text += [f'    {r["error"]}'] if r['error'] else []
  whole = ', '.join(found['replicated']) or 'none'
  one = found['step']
  waits = ''.join(
    f'; the {name} waits {one[f"{name}_waits"]:.0%} of it'
    for name in ('trainer', 'sampler')
    if one.get(f'{name}_waits')
  )
  return [
    *text,
    f'  a step: sampling {one["sampling"]:.2f} s, training {one["training"]:.2f} s, at least '
    f'{one["seconds"]:.2f} s{waits}',
    *([f'  {found["engine"]} samples, and is not counted'] if found['engine'] else []),
    f'  large parameters that every chip holds whole: {whole}',
  ]


def chosen(planned: list[aot.Planned], names: list[str]) -> list[aot.Planned]:
  """The programs of these names, without the phase; all if there are no names.

  Raises:
    ValueError: no program has one of the names.
  """
  short = lambda one: one.name.partition(' ')[2]
  known = sorted(set(map(short, planned)))
  for name in names:
    if name not in known:
      raise ValueError(f'--programs: unknown {name!r}{suggest(name, known)}')
  return [one for one in planned if not names or short(one) in names]


def check_out(path: str) -> None:
  """Refuses a file that cannot be written when all is compiled.

  Raises:
    ValueError: its folder is not there, or it is a folder.
  """
  if path and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(os.path.abspath(path)))):
    raise ValueError(f'--out={path}: expected a file in a folder that is there')


def shaped(config: Any, shape: str) -> Any:
  """The configuration with the model, or that under its adapter, replaced by one of `SHAPES`.

  Raises:
    ValueError: there is no such shape.
  """
  if shape not in SHAPES:
    raise ValueError(f'--shape={shape}: there is {", ".join(sorted(SHAPES))}')
  settings = dict(max_length=131_072, dtype='bfloat16', remat='full', attention='splash')
  made = part(models.decoder, **SHAPES[shape], **settings)
  with config.ignore_type(), config.unlocked():
    if 'base' in config.model:  # an adapter on this model
      config.model.base = made
    else:
      config.model = made
  return config


def main(argv: list[str]) -> None:
  cli.start(argv, needed=['config'])
  # Programs for a topology that is not there cannot be read back from the cache.
  jax.config.update('jax_compilation_cache_dir', None)
  with cli.refusals():
    check_out(cli.OUT.value)
    devices = aot.topology(_TOPOLOGY.value)
    kind = devices[0].device_kind
    if kind not in CHIPS:
      raise ValueError(f'--topology={_TOPOLOGY.value}: nothing is known of a {kind}')
    config = cli.config(build.TABLE)
    if _SHAPE.value:
      config = shaped(config, _SHAPE.value)
    with sharding.compiling_for(devices):
      run = build.build(config)
      run.sampled_on  # made of these devices too  # noqa: B018
    print(f'{_TOPOLOGY.value}: {len(devices)} x {kind}, mesh {sharding.sizes_of(run.mesh)}')
    if _PHASE.value and _PHASE.value not in run.order:
      raise ValueError(f'--only_phase={_PHASE.value}: the run has {", ".join(run.order)}')
    names = [_PHASE.value] if _PHASE.value else run.order
    every = [one for name in names for one in aot.plan(name, run.phases[name], run)]
    tell = lambda one: print(f'{one.name}: compiled in {one.seconds:.0f} s', file=sys.stderr)
    found = aot.compiled(chosen(every, _PROGRAMS.value), tell)
  said = report(run, found, kind)
  print('\n'.join(lines(said)))
  if cli.OUT.value:
    with open(cli.OUT.value, 'w') as file:
      json.dump(said, file, indent=2)
  sys.exit(any(r['verdict'].startswith('does not') for r in said['programs']))


if __name__ == '__main__':
  cli.run(main)
