"""The command line of reports that keep the numbers of methods which are not computed again."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any


def parse(
  description: str, names: Sequence[str], stored: Callable[[], dict[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
  """What stays of the last report, and the methods that are computed now.

  Without arguments all are computed, and nothing stays. Names compute these, `--new` those that the
  report lacks, and `--table` none.

  Args:
    description: of the program, for --help.
    names: all methods.
    stored: the numbers of the last report by method.
  """
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument('methods', nargs='*', help=f'out of {", ".join(names)}; none: all')
  parser.add_argument('--new', action='store_true', help='those that the report does not have')
  parser.add_argument('--table', action='store_true', help='only write the page')
  arguments = parser.parse_args()
  unknown = sorted(set(arguments.methods) - set(names))
  if unknown:
    parser.error(f'unknown {unknown}; valid: {list(names)}')
  before = stored() if arguments.methods or arguments.new or arguments.table else {}
  new = [name for name in names if name not in before]
  return before, [] if arguments.table else arguments.methods or new
