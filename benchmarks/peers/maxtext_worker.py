"""Compiles MaxText's train step ahead of time, and keeps the text of the program and its memory.

    python maxtext_worker.py OUT base.yml NAME=VALUE ...

Run by `benchmarks.maxtext` with a Python that has MaxText; it imports nothing of polgrad.
"""

import json
import pathlib
import sys

import jax
from maxtext.trainers.pre_train import train_compile


def main() -> None:
  out, config, *settings = sys.argv[1:]
  compile_step = train_compile.jit_and_compile

  def kept(*args, **kwargs):
    compiled = compile_step(*args, **kwargs)
    memory = compiled.memory_analysis()
    found = {
      'arguments': memory.argument_size_in_bytes,
      'temporary': memory.temp_size_in_bytes,
      'held': memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      + memory.temp_size_in_bytes
      - memory.alias_size_in_bytes,
      'jax': jax.__version__,
    }
    folder = pathlib.Path(out)
    (folder / 'program.txt').write_text(compiled.as_text())
    (folder / 'memory.json').write_text(json.dumps(found))
    return compiled

  train_compile.jit_and_compile = kept
  train_compile.main([sys.argv[0], config, *settings])


if __name__ == '__main__':
  main()
