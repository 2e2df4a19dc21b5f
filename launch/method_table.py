"""Writes docs/methods.md, the table of all methods, and their numbers in README.md, from the methods.

python launch/method_table.py           # rewrites both
python launch/method_table.py --check   # exits with 1 if they are not what the methods say
"""

import inspect
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this clone, not another polgrad that may be installed

from polgrad import methods  # noqa: E402
from polgrad.options import from_text  # noqa: E402

PAGE, README = ROOT / 'docs' / 'methods.md', ROOT / 'README.md'
# What goes without saying.
USUAL = {
  **{'ratio': 'token', 'proximal': 'recorded', 'loss': 'nll', 'normalizer': 'identity'},
  'shape': 'identity',
  'head': 'Scalar',
}
TITLES = {
  'policy_gradient': 'Policy gradients',
  'multi_turn': 'Several turns',
  'preference': 'Preferences',
  'reward_model': 'Reward models',
  'controlled_decoding': 'Controlled decoding',
  'distillation': 'Distillation',
  'supervised': 'Supervised learning',
}
INTRODUCTION = """# Methods

Written by `python launch/method_table.py`; a test compares the page with the methods.

Any method runs on any task and model that have what it needs:
`--config=experiments/run.py:method=NAME,task=...,model=...`. In a notebook it is
`polgrad.methods.NAME(...)`. The parts are what a method chooses beyond the usual. The last column says
how sure we are of the formula: CODE, read in released code; PAPER, in the paper; DERIVED, follows from
one of them; MEMORY, written down from memory.

Methods for several turns are policy gradients whose credit looks at turns
([turn_credit.md](turn_credit.md)). On a task of one turn they run as well."""
# What a method function gets from a run; the page shows none of it.
BUDGETS = dict(max_new_tokens=2, samples_per_prompt=4, candidates=2, steps=100)
BUDGETS |= dict(learning_rate=0.01, supervised_rate=0.01)


def main() -> None:
  wanted = {PAGE: page(), README: readme()}
  if '--check' in sys.argv:
    sys.exit(any(path.read_text() != text for path, text in wanted.items()))
  for path, text in wanted.items():
    path.write_text(text)


def readme() -> str:
  """The text of README.md with the current numbers of methods."""
  count = {family: len(names) for family, names in methods.FAMILIES.items()}
  gradients, preferences = count['policy_gradient'], count['preference']
  text = re.sub(
    r'\d+ published methods', f'{sum(count.values())} published methods', README.read_text()
  )
  text = re.sub(r'\d+ policy gradients', f'{gradients} policy gradients', text)
  return re.sub(r'\d+ preference losses', f'{preferences} preference losses', text)


def page() -> str:
  lines = [INTRODUCTION]
  for family, names in methods.FAMILIES.items():
    head = ['| method | parts | needs | source | sure |', '|---|---|---|---|---|']
    lines += ['', f'## {TITLES[family]}', '', *head, *(row(family, name) for name in names)]
  return '\n'.join(lines) + '\n'


def row(family: str, name: str) -> str:
  doc = methods.TABLE[name].__doc__
  title, source = re.match(r'(.*?) \((.*?)\):', doc).groups()
  confidence = re.search(r'Confidence:\s+(.*?)(?:\.\s|\.$|\n\n|$)', doc, re.DOTALL)[1]
  grades = ', '.join(dict.fromkeys(re.findall(r'CODE|PAPER|DERIVED|MEMORY', confidence)))
  phase = from_text(f'method={name},task=addition,model=tiny').phases.train.to_dict()
  takes = inspect.signature(methods.TABLE[name]).parameters
  needs = methods.TABLE[name](**{k: v for k, v in BUDGETS.items() if k in takes}).needs
  sources = re.sub(r'(?:arXiv:)?(\d{4}\.\d{4,5})', r'[\1](https://arxiv.org/abs/\1)', source)
  path = f'../polgrad/methods/{family}/{name}.py'
  return f'| [`{name}`]({path}) {title} | {slots(phase)} | {needs} | {sources} | {grades} |'


def slots(phase: dict) -> str:
  """The parts that a method chose, by slot."""
  objective = phase['objective']
  ordered = {k: objective[k] for k in sorted(objective, key=_place)}
  chosen = [*_named('', phase['credit']), *_named('', ordered)]
  if _short(phase['optimizer']) != 'adamw':
    chosen.append(_short(phase['optimizer']))
  collect = phase['collect']
  if _short(collect) == 'Explored':
    chosen.append('Explored')
  extras = ('lag', 'replay', 'baseline_samples', 'demonstrations', 'max_resamples')
  extras += ('opponents', 'resets', 'preferences')
  if _short(collect.get('choose', {'name': '.everything'})) != 'everything':
    chosen.append(_short(collect['choose']))
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
