"""The HTML files: values in the templates of `templates/`, with everything escaped."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import jinja2

from polgrad.view import charts, runs, tokens
from polgrad.whole_files import writing


@functools.cache
def environment() -> jinja2.Environment:
  """The templates; a name that a template does not get is an error."""
  return jinja2.Environment(
    loader=jinja2.PackageLoader('polgrad.view'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda x: tokens.clean(x) if type(x) is str else x,  # markup is clean already
    trim_blocks=True,
    lstrip_blocks=True,
  )


def render(template: str, quantities: Sequence[tokens.Quantity], **values: Any) -> str:
  """A page; every value is text in it, whatever characters it has."""
  return (
    environment()
    .get_template(template)
    .render(quantities=quantities, levels=range(1, tokens.STEPS + 1), **values)
  )


def of_runs(workdirs: Sequence[str], limits: runs.Limits) -> str:
  """The page of some runs; see `runs.read`, also for what it raises."""
  found = runs.read(workdirs, limits)
  rows = [run.metrics for run in found]
  keys = {quantity.key for run in found for quantity in run.quantities}
  return render(
    'runs.html',
    [quantity for key, quantity in tokens.KEYS.items() if key in keys],
    title=', '.join(run.label for run in found),
    runs=found,
    summaries=[runs.summary(run) for run in found],
    families=charts.families(rows),
    constants=charts.constants(rows),
    differences=runs.differences(found) if len(found) > 1 else [],
    chosen=runs.chosen(found),
    sizes=charts,
    limits=limits,
  )


def write(path: str, text: str) -> None:
  """Writes a page whole, or not at all."""
  folder = os.path.dirname(path)
  if folder:
    os.makedirs(folder, exist_ok=True)
  with writing(path, encoding='utf-8', errors='replace') as f:
    f.write(text)
