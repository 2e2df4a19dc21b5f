"""Opens pages of `polgrad.view` in a headless Chromium, and checks what a parser of HTML cannot see.

    apt-get install chromium && pip install playwright
    python -m benchmarks.view_in_browser runs/first runs/second

For the page of the runs and for one of a made run with hostile texts, at 1280 and 400 pixels, in light
and dark: no message in the console, nothing is loaded, curves are drawn, the page is not wider than its
window, every button changes the colours of tokens, and hostile texts run nothing. `make test` cannot do
this, because no package on PyPI has a browser; it checks the HTML itself (`tests/look_test.py`).
"""

import json
import math
import os
import pathlib
import sys
import tempfile

import numpy as np

from polgrad import row_files
from polgrad.data import tokenizers
from polgrad.types import Batch, Layout

HOSTILE = (
  '</script><script>alert(1)</script></style>"\'><img src=x onerror=alert(2)>\x00\x1b[31m\ud800é'
)


def bytes_batch(texts, *, prompt='a+b='):
  """Rows of the byte tokenizer with these completions."""
  tokenizer = tokenizers.byte()
  rows = [(list(prompt.encode()), [*text.encode('utf-8', 'replace'), 258]) for text in texts]
  width = len(prompt) + max(len(made) for _, made in rows)
  shape = len(rows), width
  batch = Batch(
    tokens=np.full(shape, 256, np.int32),
    segment_ids=np.zeros(shape, np.int32),
    mask=np.zeros(shape, bool),
    behavior_logp=np.zeros(shape, np.float32),
    advantages=np.zeros(shape, np.float32),
    rewards=np.arange(len(rows), dtype=np.float32),
    valid=np.ones(len(rows), bool),
    group_ids=np.zeros(len(rows), np.int32),
    layout=Layout(prompt_length=len(prompt)),
  )
  for i, (asked, made) in enumerate(rows):
    end = len(asked) + len(made)
    batch.tokens[i, :end] = asked + made
    batch.segment_ids[i, :end] = 1
    batch.mask[i, len(asked) : end] = True
    batch.behavior_logp[i, len(asked) : end] = -0.5
    batch.advantages[i, len(asked) : end] = i - 0.5
  return batch, tokenizer


def hostile_run(workdir: str) -> str:
  """Makes the folder of a run all of whose texts are hostile; returns it."""
  os.makedirs(workdir)
  phase = '</p>\x00"&/'
  kept = row_files.Store(workdir, step=0, past=(), limit=2**30)
  batch, tokenizer = bytes_batch([HOSTILE, 'x'], prompt='<b>&')
  kept.write_rows(phase, 3, batch, 2, tokenizer=tokenizer, terms={'<i>': np.ones(2)})
  kept.write_samples(phase, 3, [(HOSTILE, HOSTILE, math.nan), ('</td>', '<!--', 1.0)])
  rows = [
    {'step': i, 'phase': phase if i else '<p>', HOSTILE: i, 'none': None, 'big': 10.0**i}
    for i in range(3)
  ]
  folder = pathlib.Path(workdir)
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  (folder / 'config.json').write_text(json.dumps({'name': 'x', HOSTILE: HOSTILE, 'seed': 1}))
  return workdir


# In the page: the background of each token of the batches that are open.
COLORS = (
  "[...document.querySelectorAll('.tokens i')].map(x => getComputedStyle(x).backgroundColor).join()"
)
CURVES = "[...document.querySelectorAll('polyline')].filter(x => x.getBBox().width > 1).length"


def check(browser, path: str, width: int, scheme: str) -> None:
  """Raises an AssertionError if the page is not as the docstring of this file says."""
  said, loaded = [], []
  page = browser.new_page(viewport={'width': width, 'height': 900}, color_scheme=scheme)
  page.on('console', lambda message: said.append(message.text))
  page.on('pageerror', lambda error: said.append(str(error)))
  page.on('dialog', lambda dialog: said.append(dialog.message))
  page.on('request', lambda request: loaded.append(request.url))
  page.goto(f'file://{path}')
  assert page.evaluate('document.documentElement.scrollWidth') <= width
  assert page.evaluate(CURVES) > 0
  labels = page.locator('.bar label').all()
  seen = set()
  for label in labels:
    label.click()
    seen.add(page.evaluate(COLORS))
  assert len(seen) == len(labels), f'{len(labels)} buttons, {len(seen)} colourings'
  closed = page.locator('details:not([open]) > summary').first
  before = page.evaluate('document.documentElement.scrollHeight')
  closed.click()
  assert page.evaluate('document.documentElement.scrollHeight') > before
  assert not page.locator('script, img').count()
  assert said == [] and loaded == [f'file://{path}'], (said, loaded)
  page.close()


def main(workdirs: list[str]) -> None:
  from playwright.sync_api import sync_playwright

  from polgrad.view import page, runs

  with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path='/usr/bin/chromium', args=['--no-sandbox'])
    pages = {'hostile': [hostile_run(f'{folder}/run')], **({'runs': workdirs} if workdirs else {})}
    for name, shown in pages.items():
      path = f'{folder}/{name}.html'
      page.write(path, page.of_runs(shown, runs.Limits()))
      for width in (1280, 400):
        for scheme in ('light', 'dark'):
          check(browser, path, width, scheme)
          print(f'{name}, {width} pixels, {scheme}: right')
    browser.close()


if __name__ == '__main__':
  main(sys.argv[1:])
