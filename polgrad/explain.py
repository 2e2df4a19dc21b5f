"""Says what a run computes, from which arrays, and lists every knob with its flag.

    python -m polgrad.explain --config=experiments/quickstart.py
    python -m polgrad.explain --config=experiments/quickstart.py --grep=clip

A `*` marks knobs that do not have their default value. With `--grep`, only the knobs are listed whose
flag or documentation has a match of the regular expression, upper and lower case alike. Nothing is run.
"""

import dataclasses
import functools
import inspect
import json
import math
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

from polgrad import cli, sharding
from polgrad.arrays import ARRAYS, MODEL
from polgrad.build import TABLE, Experiment, Phase, build
from polgrad.checks import tables, tracing
from polgrad.models.config import Config
from polgrad.models.policy import learned
from polgrad.objectives import networks
from polgrad.registry import (
  Weighted,
  find,
  inputs,
  knobs_of,
  name_of,
  several_of,
  table_of,
  unbound,
)

_GREP = flags.DEFINE_string('grep', '', 'List only the knobs that this regular expression finds.')


class Knob(NamedTuple):
  """A value of the configuration that is no part."""

  path: str  # from 'config' on
  value: Any
  default: Any  # inspect.Parameter.empty: it has none
  doc: str  # one line, '' if there is none

  @property
  def usual(self) -> bool:
    return self.value == self.default

  @property
  def flag(self) -> str:
    return f'--{self.path}={shown(self.value)}'


class ConfigPart(NamedTuple):
  """A part of the configuration."""

  path: str
  name: str
  fn: Callable
  depth: int  # number of parts around it
  knobs: tuple[Knob, ...]  # its own, without those of parts inside


def parts(
  spec: Mapping, choices: Mapping, path: str = 'config', depth: int = 0
) -> Iterator[ConfigPart]:
  """The parts of a configuration, outer ones first."""
  fn = find(spec['name'], choices, path)
  hints, docs = typing.get_type_hints(fn, include_extras=True), knob_docs(fn)
  own, inner = [], []
  if 'weight' in spec:
    own.append(Knob(f'{path}.weight', spec['weight'], inspect.Parameter.empty, 'coefficient'))
  for name, parameter in knobs_of(fn).items():
    value, hint = spec.get(name, parameter.default), hints.get(name)
    if table_of(hint) is not None:
      inner.append((value, table_of(hint), f'{path}.{name}'))
    elif several_of(hint) is not None:
      table = table_of(several_of(hint))
      inner += [(one, table, f'{path}.{name}.{key}') for key, one in value.items()]
    else:
      own.append(Knob(f'{path}.{name}', value, parameter.default, docs.get(name, '')))
  yield ConfigPart(path, spec['name'], fn, depth, tuple(own))
  for value, table, where in inner:
    # A part that the configuration leaves to its default is written as a function.
    spec = {'name': name_of(value)} if callable(value) else value
    yield from parts(spec, table, where, depth + 1)


def knob_docs(fn: Callable) -> dict[str, str]:
  """One line for each documented knob of a function or dataclass.

  It is read from `Args:` or `Attributes:` of the docstring, from the comment above or behind a field of
  a dataclass, or else it is the first sentence of the docstring that names the knob.
  """
  docs = _comments(Config) if fn.__module__.startswith('polgrad.models') else {}
  for one in reversed(fn.__mro__) if inspect.isclass(fn) else [fn]:
    docs |= _comments(one) if dataclasses.is_dataclass(one) else {}
    docs |= _listed(inspect.getdoc(one) or '')
  text = ' '.join((inspect.getdoc(fn) or '').partition('>>>')[0].split())
  for name in knobs_of(fn).keys() - docs.keys():
    named = re.compile(rf'`[^`]*\b{name}\b[^`]*`')
    docs[name] = next((s for s in _sentences(text) if named.search(s)), '')
  first = {name: _sentences(docs[name])[0] for name in knobs_of(fn) if docs.get(name)}
  return {name: text[:1].upper() + text[1:] for name, text in first.items()}


def _sentences(text: str) -> list[str]:
  """The sentences of a text in one line."""
  return re.split(r'(?<=\.) (?=[A-Z`])', ' '.join(text.split()))


def _listed(doc: str) -> dict[str, str]:
  """What a docstring says of each name in its list of arguments or attributes."""
  found = {}
  for block in re.findall(r'^(?:Args|Attributes):\n((?:  .*\n?|\n)*)', doc, re.MULTILINE):
    for names, text in re.findall(r'^  ([\w, ]+): ((?:.*\n?)(?:    .*\n?)*)', block, re.MULTILINE):
      found |= dict.fromkeys(names.split(', '), text)
  return found


@functools.cache
def _comments(cls: type) -> dict[str, str]:
  """The comments above and behind the fields of a dataclass."""
  try:
    lines = inspect.getsource(cls).splitlines()
  except OSError:
    return {}
  found, above = {}, []
  for line in lines:
    field = re.match(r'  (\w+): [^#]*(?:#\s*(.*))?$', line)
    if comment := re.match(r'  # (.*)', line):
      above.append(comment[1])
    elif field and field[1] in cls.__dataclass_fields__:
      text = field[2] or ' '.join(above)
      found |= {field[1]: text} if text else {}
      above = []
    else:
      above = []
  return found


def shown(value: Any) -> str:
  """A value as the command line has it."""
  if isinstance(value, Mapping | ConfigDict):
    return json.dumps(dict(value))
  if isinstance(value, bool):
    return str(value).lower()
  text = repr(tuple(value)) if isinstance(value, list | tuple) else str(value)
  if not re.search(r'[^\w./:+=,~@%-]', text):
    return text
  return f'"{text}"' if "'" in text and not re.search(r'["$`\\!]', text) else shlex.quote(text)


def knob_lines(spec: Mapping, pattern: str = '') -> list[str]:
  """Every knob (or those that `pattern` finds): its flag, its default and what it is."""
  lines = []
  for part in parts(spec, TABLE):
    chosen = [k for k in part.knobs if re.search(pattern, f'{k.flag} {k.doc}', re.IGNORECASE)]
    if chosen:
      lines += ['', f'{part.path}.name={part.name}']
    for knob in chosen:
      default = knob.default
      if default is inspect.Parameter.empty:
        mark, told = ' ', ''
      else:
        mark, told = (' ', '') if knob.usual else ('*', f'  (default {shown(default)})')
      lines.append(f'{mark} {knob.flag}{told}')
      lines += tables.wrapped(knob.doc, '      ', '      ') if knob.doc else []
  return lines


def title(fn: Callable) -> str:
  """The first sentence of the documentation of a part."""
  return _sentences((inspect.getdoc(fn) or '').partition('\n\n')[0])[0]


def signature(fn: Callable) -> str:
  """A function with the arrays that it reads: `surrogates.clipped(log_ratio, advantages)`."""
  bare = unbound(fn.fn if isinstance(fn, Weighted) else fn)
  return f'{name_of(bare)}({", ".join(inputs(bare))})'


def provider(name: str, phase: Phase) -> str:
  """Who provides an array that the objective or credit reads."""
  anchor = name.removesuffix('_logp').removesuffix('_logits').removesuffix('_head_score')
  if name in phase.credit.provides:
    return 'credit'
  if name in getattr(phase.collect, 'stats', {}):
    return f'collect.stats.{name}'
  for model in phase.elsewhere:
    if anchor == model or name.startswith(f'{model}_top_'):
      return f'elsewhere.{model}'
  if anchor in phase.anchors:
    return f'anchor {anchor}'
  if name.removesuffix('_scores') in phase.networks:
    return f'network {name.removesuffix("_scores")}'
  if name in MODEL:
    return 'the model'
  return 'the model, before the update' if name == 'old_values' else 'collect'


def phase_lines(name: str, spec: Mapping, phase: Phase, run: Experiment) -> list[str]:
  """What a phase computes, from what."""
  collector, updates = phase.collect, phase.epochs * phase.minibatches
  own = [p for p in parts(spec, {'build.Phase': Phase}, f'phases.{name}') if p.depth]
  early = f', fewer if {phase.plateau_metric} no longer rises' if phase.plateau else ''
  lines = [
    '',
    f'phase {name}: {phase.steps:,} steps of {collector.rows} rows x {collector.length} tokens, '
    f'{updates} updates each{early}',
  ]
  width = max(len(p.path) for p in own) - len(f'phases.{name}.')
  for part in own:
    place = part.path.removeprefix(f'phases.{name}.')
    weight = next((f'{k.value} x ' for k in part.knobs if k.path.endswith('.weight')), '')
    lines += tables.wrapped(
      f'{place:{width}}  {weight}{part.name}: {title(part.fn)}', '  ', ' ' * (width + 4)
    )
  lines += loss_lines(name, phase, run)
  for slot, several in (('learned', phase.learned), ('further', phase.further)):
    for other, one in several.items():
      # An anchor in the place of the policy, as it is while it learns; its credit is that of the phase.
      alone = dataclasses.replace(phase, objective=one.objective, learned={}, further={})
      lines += loss_lines(name, alone, run, f'{slot}.{other}')
  for network in phase.networks:
    lines += network_lines(network, phase, run)
  return lines


def network_lines(name: str, phase: Phase, run: Experiment) -> list[str]:
  """The loss of a network of a phase, what it reads, and its metrics."""
  one = phase.network_learners(run.policy)[name]
  network, count = one.network, one.policy.config.num_layers
  numbers = ', '.join(map(str, networks.numbers_of_layers(network.layers, count)))
  arrays = ', '.join(sorted(network.requires))
  kind = name_of(type(network))
  lines = [
    f'loss of network {name} = the mean error of {kind} over the tokens that it learns',
    f'it reads states of {one.states_of} behind layers {numbers} of {count}, and {arrays}; it gives '
    f'{name}_scores; no gradient of it reaches a model',
    f'metrics: {name}/loss, {name}/grad_norm, {name}/tokens',
  ]
  return [wrapped for line in lines for wrapped in tables.wrapped(line, '  ', '    ')]


def loss_lines(name: str, phase: Phase, run: Experiment, place: str = '') -> list[str]:
  """The terms of a loss of a phase, the functions that make them, and the arrays that they read.

  Args:
    place: of the loss in the phase, `learned.ANCHOR` or `further.NAME`; '' is that of the policy.
  """
  path = f'config.phases.{name}' + (f'.{place}' if place else '')
  traced = tracing.trace_objective(path, phase, run.policy)
  slot, _, other = place.partition('.')
  owner = {'learned': f' of anchor {other}', 'further': f' of further updates {other}'}.get(
    slot, ''
  )
  lines = [f'  loss{owner} = {" + ".join(traced.terms)}, computed by']
  factors = {f'penalties.{k}': p for k, p in getattr(phase.objective, 'penalties', {}).items()}
  for slot, fn in phase.objective.slots.items():
    factor = f'{factors[slot].weight:g} x ' if slot in factors else ''
    lines.append(f'    {slot}: {factor}{signature(fn)}')
  named = {id(fn) for fn in phase.objective.slots.values()}
  stats = {k: f for k, f in phase.objective.stats.items() if id(f) not in named}
  lines += [f'    stats.{k}: {signature(f)}' for k, f in stats.items()]
  wanted = sorted(phase.objective.requires | (frozenset() if other else phase.credit.requires))
  rows = []
  for array in wanted:
    doc = ARRAYS[array].doc.partition(';')[0] if array in ARRAYS else ''
    rows.append((array, provider(array, phase), doc))
  if rows:
    readers = 'this objective reads' if other else 'objective and credit read'
    lines += [f'  arrays that {readers}, beside logp and mask']
    lines += tables.table(('array', 'from', 'what it is'), rows, indent=4)
  prefix = f'{other}/' if other else ''
  metrics = ', '.join(prefix + metric for metric in traced.metrics)
  return lines + tables.wrapped(f'metrics: {metrics}', '  ', '    ')


def run_lines(run: Experiment) -> list[str]:
  """The model, the devices and the order of the run."""
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  shapes = run.policy.shapes()
  mesh = ', '.join(f'{axis}={size}' for axis, size in sharding.sizes_of(run.mesh).items())
  return [
    f'model: {count(shapes):,} parameters, of which {count(learned(run.policy, shapes)):,} are trained',
    f'devices: {run.mesh.size} {run.mesh.devices.flat[0].platform} ({mesh})',
    f'phases: {", then ".join(run.order)}',
    f'evaluation: every {run.evaluation.every} steps'
    if run.evaluation.every
    else 'evaluation: never',
  ]


def explain(config: ConfigDict, run: Experiment, pattern: str = '') -> Sequence[str]:
  """The lines of the whole explanation, or with `pattern` of the knobs that it finds."""
  spec = config.to_dict()
  if pattern:
    return knob_lines(spec, pattern)
  lines = run_lines(run)
  for name in run.order:
    lines += phase_lines(name, spec['phases'][name], run.phases[name], run)
  return [*lines, '', 'knobs (* not the default)', *knob_lines(spec)]


def main(argv: list[str]) -> None:
  cli.start(argv, needed=['config'])
  with cli.refusals():
    config = cli.config(TABLE)
    try:
      re.compile(_GREP.value)
    except re.error as error:
      raise ValueError(f'--grep: {error}') from error
    lines = explain(config, build(config), _GREP.value)
  try:
    print('\n'.join(lines), flush=True)
  except BrokenPipeError:  # of `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == '__main__':
  cli.run(main)
