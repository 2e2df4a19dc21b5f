"""Any method on any task with any model: `:method=...,task=...,model=...`, and options of the three.

    python -m polgrad.train --config=experiments/run.py:method=dapo,task=addition,model=tiny \
      --workdir=runs/dapo

`polgrad.methods`, `polgrad.tasks` and `polgrad.presets` list what there is. The text after the colon
chooses the parts of a run and their main settings. Every value of the complete configuration can then
be changed on top of it, for example by `--config.phases.train.optimizer.learning_rate=3e-5`. A part is
exchanged by its name: `--config.phases.train.optimizer.schedule.name=cosine`, `...schedule.steps=100`.
"""

from polgrad.options import from_text


def get_config(text: str = ''):
  return from_text(text)
