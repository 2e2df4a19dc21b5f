"""Writes the table of policy-gradient methods in README.md from the experiments themselves.

python launch/method_table.py           # rewrites the table
python launch/method_table.py --check   # exits with 1 if it is not what the experiments say
"""

import importlib
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / 'experiments' / 'policy_gradient'
BEGIN, END = '<!-- methods: launch/method_table.py -->', '<!-- end of methods -->'
# What goes without saying.
USUAL = {'ratio': 'token', 'proximal': 'recorded', 'loss': 'nll', 'normalizer': 'identity'}


def main() -> None:
  path = ROOT / 'README.md'
  text = path.read_text()
  before, rest = text.split(BEGIN)
  _, after = rest.split(END)
  new = f'{before}{BEGIN}\n{table()}\n{END}{after}'
  if '--check' in sys.argv:
    sys.exit(text != new)
  path.write_text(new)


def table() -> str:
  names = sorted(p.stem for p in FOLDER.glob('*.py') if not p.stem.startswith(('__', 'hub_')))
  lines = ['| method | slots | card | config |', '|---|---|---|---|']
  return '\n'.join([*lines, *(row(name) for name in names)])


def row(name: str) -> str:
  module = importlib.import_module(f'experiments.policy_gradient.{name}')
  title, source = re.match(r'(.*?) \((.*?)\):', module.__doc__).groups()
  confidence = re.search(r'Confidence:\s+(.*?)(?:\.\s|\.$|\n\n)', module.__doc__, re.DOTALL)[1]
  words = re.findall(r'CODE|PAPER|DERIVED|MEMORY', confidence)
  card = re.search(r'Card: (.*?)\.\n', module.__doc__)[1]
  config = module.get_config('')
  phase = config.phases[config.order[-1]].to_dict()
  path = f'experiments/policy_gradient/{name}.py'
  sources = re.sub(r'(?:arXiv:)?(\d{4}\.\d{4,5})', r'[\1](https://arxiv.org/abs/\1)', source)
  grades = ', '.join(dict.fromkeys(words))
  return f'| {title} | {slots(phase)} | {card}; {sources}; {grades} | [`{name}`]({path}) |'


def slots(phase: dict) -> str:
  """The parts that a configuration chose, by slot."""
  objective = phase['objective']
  ordered = {k: objective[k] for k in sorted(objective, key=_place)}
  chosen = [*_named('', phase['credit']), *_named('', ordered)]
  if _short(phase['optimizer']) != 'adamw':
    chosen.append(_short(phase['optimizer']))
  collect = phase['collect']
  if _short(collect) != 'rollouts':
    chosen.append(_short(collect))
  extras = ('lag', 'replay', 'baseline_samples', 'demonstrations', 'max_resamples')
  chosen += [k for k in extras if collect.get(k)]
  return ' '.join(f'`{c}`' for c in dict.fromkeys(chosen) if c)


ORDER = (
  'name',
  'score',
  'center',
  'surrogate',
  'ratio',
  'proximal',
  'weights',
  'selections',
  'penalties',
)


def _place(slot: str) -> int:
  return ORDER.index(slot) if slot in ORDER else len(ORDER)


def _short(part: dict) -> str:
  """The name of a function without that of its module."""
  return part['name'].partition('.')[2]


def _named(slot: str, part: dict) -> list[str]:
  """The names of a part and of what it holds, without the usual ones."""
  families = ('PolicyGradient', 'outcome', 'nothing', 'WeightedSum')
  own = [] if _short(part) in families or USUAL.get(slot) == _short(part) else [_short(part)]
  for knob, value in part.items():
    if isinstance(value, dict) and 'name' in value:
      own += _named(knob, value)
    elif isinstance(value, dict):
      for inner in value.values():
        own += _named('', inner) if isinstance(inner, dict) and 'name' in inner else []
  return own


if __name__ == '__main__':
  main()
