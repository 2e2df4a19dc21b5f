"""Makes one HTML file of a run, or of several beside each other; it needs no network and no server.

python -m polgrad.view runs/quickstart --out=view.html
python -m polgrad.view runs/first runs/second --out=both.html
"""

import os

from absl import app, flags

from polgrad import cli
from polgrad.view import page, runs

_BATCHES = flags.DEFINE_integer(
  'batches', runs.Limits().steps, 'Batches and evaluations to show of each run.', 1
)
_ROWS = flags.DEFINE_integer('rows', runs.Limits().rows, 'Rows to show of each of them.', 1)
_TOKENS = flags.DEFINE_integer(
  'tokens', runs.Limits().tokens, 'Tokens to show of all rows; each takes about 100 bytes.', 1000
)


def main(argv: list[str]) -> None:
  workdirs = [os.path.expanduser(path) for path in argv[1:]]
  cli.start(argv[:1], needed=[])
  if not workdirs:
    raise app.UsageError('name the folder of a run, or several')
  limits = runs.Limits(_BATCHES.value, _ROWS.value, _TOKENS.value)
  with cli.refusals():
    text = page.of_runs(workdirs, limits)
    path = os.path.expanduser(cli.OUT.value or 'view.html')
    page.write(path, text)
  print(f'{path}: {len(text.encode()) / 2**20:.2f} MiB; open it in a browser')


if __name__ == '__main__':
  cli.run(main)
