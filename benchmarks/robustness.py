"""Results of `benchmarks.fuzz` and `benchmarks.kills`, and the tables of docs/robustness.md.

python -m benchmarks.robustness     # writes the tables of the page again
"""

import json
import pathlib

from benchmarks import marks

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
RESULTS, PAGE = DOCS / 'robustness.json', DOCS / 'robustness.md'
OUTCOMES = ('right', 'refused', 'contained', 'fault')
# Where a run was when `benchmarks.kills` killed it.
PLACES = ('before the first step', 'in a step', 'in a save', 'after the last step')


def record(campaign: str, results: dict[str, dict]) -> None:
  """Writes results by kind to docs/robustness.json, in place of older ones, and the tables again."""
  known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  known[campaign] = known.get(campaign, {}) | results
  RESULTS.write_text(json.dumps(known, indent=1) + '\n')
  if PAGE.exists():
    write_page()


def write_page() -> None:
  PAGE.write_text(with_tables(PAGE.read_text(), json.loads(RESULTS.read_text())))


def with_tables(text: str, known: dict[str, dict]) -> str:
  """The text of the page with the tables of these results."""
  for campaign, results in known.items():
    table = {'fuzz': fuzz_table, 'kills': kills_table}[campaign](results)
    text = marks.with_table(text, campaign, table)
  return text


def fuzz_table(results: dict[str, dict]) -> str:
  rows = [
    [name, *(row.get(o, 0) for o in OUTCOMES), row['slowest']] for name, row in results.items()
  ]
  totals = [sum(row[i] for row in rows) for i in range(1, len(OUTCOMES) + 1)]
  header = ['inputs', 'number', *OUTCOMES, 'slowest (s)']
  made = [[row[0], sum(row[1:-1]), *row[1:]] for row in [*rows, ['all', *totals, '']]]
  return marks.table(header, made)


def kills_table(results: dict[str, dict]) -> str:
  last = ('runs', 'compared', 'arrays', 'rows')
  rows = [
    [name, *(row['places'].get(p, 0) for p in PLACES), *(row[key] for key in last)]
    for name, row in results.items()
  ]
  totals = [sum(row[i] for row in rows) for i in range(1, len(rows[0]))]
  made = [[row[0], sum(row[1 : len(PLACES) + 1]), *row[1:]] for row in [*rows, ['all', *totals]]]
  header = [
    'run',
    'kills',
    *PLACES,
    'runs to the end',
    'arrays compared',
    'of these differ',
    'rows differ',
  ]
  return marks.table(header, made)


if __name__ == '__main__':
  write_page()
