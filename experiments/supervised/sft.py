"""Supervised fine-tuning: token mean of -log pi over the answers and their stop tokens (standard).

The denominator is the number of answer tokens in the whole batch, whatever the micro-batches.

    python -m polgrad.train --config=experiments/supervised/sft.py --workdir=runs/sft
"""

from experiments.common import arithmetic_experiment, options, warm_start


def get_config(text: str = ''):
  o = options(text, steps=600, smoke=False)
  return arithmetic_experiment({'sft': warm_start(steps=o.steps)}, smoke=o.smoke)
