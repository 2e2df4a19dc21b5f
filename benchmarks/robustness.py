"""Results of `benchmarks.fuzz` and `benchmarks.kills`, and the tables of docs/robustness.md.

python -m benchmarks.robustness     # writes the tables of the page again
"""

import json
import pathlib
import re

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
RESULTS, PAGE = DOCS / 'robustness.json', DOCS / 'robustness.md'


def record(campaign: str, result: dict) -> None:
  """Keeps the result of a campaign, and writes its table into the page."""
  known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  RESULTS.write_text(json.dumps({**known, campaign: result}, indent=1) + '\n')
  if PAGE.exists():
    write_page()


def write_page() -> None:
  known, text = json.loads(RESULTS.read_text()), PAGE.read_text()
  for campaign, make in {'fuzz': fuzz_table, 'kills': kills_table}.items():
    if campaign in known:
      table = '\n'.join(make(known[campaign]))
      block = f'<!-- {campaign} -->\n{table}\n<!-- end -->'
      text = re.sub(
        rf'<!-- {campaign} -->.*?<!-- end -->', lambda _, b=block: b, text, flags=re.DOTALL
      )
  PAGE.write_text(text)


def fuzz_table(result: dict) -> list[str]:
  columns = ('right', 'refused', 'contained', 'fault')
  rows = [
    '| kind | inputs | right | refused | contained | faults | slowest (s) |',
    '|---|---|---|---|---|---|---|',
  ]
  total = dict.fromkeys(columns, 0)
  for name, row in result['kinds'].items():
    counts = [row.get(c, 0) for c in columns]
    total = {c: total[c] + n for c, n in zip(columns, counts)}
    rows.append(f'| {name} | {sum(counts)} | {" | ".join(map(str, counts))} | {row["slowest"]} |')
  rows.append(f'| **all** | {sum(total.values())} | {" | ".join(map(str, total.values()))} | |')
  return rows


def kills_table(result: dict) -> list[str]:
  places = result['places']
  rows = [
    f'| run | kills | {" | ".join(places)} | differing arrays | differing rows |',
    '|---' * (len(places) + 4) + '|',
  ]
  total = dict.fromkeys(places, 0)
  for name, row in result['runs'].items():
    counts = [row['places'].get(p, 0) for p in places]
    total = {p: total[p] + n for p, n in zip(places, counts)}
    shown = ' | '.join(map(str, counts))
    rows.append(f'| {name} | {sum(counts)} | {shown} | {row["arrays"]} | {row["rows"]} |')
  rows.append(f'| **all** | {sum(total.values())} | {" | ".join(map(str, total.values()))} | | |')
  return rows


if __name__ == '__main__':
  write_page()
