"""Supervised fine-tuning of a real model on worked sums: token mean of -log pi (standard).

Only the answers and the tokens that end them are trained; the chat template's words are not. With
`:lora=8` it trains an adapter (LoRA, arXiv:2106.09685) at ten times the learning rate.

    python -m polgrad.train --config=experiments/supervised/hub_sft.py:path=FOLDER \\
      --workdir=runs/hub_sft

MEASURED
"""

from experiments.hub import hub_experiment, hub_options, sums
from polgrad import collect, objectives, optim
from polgrad.build import phase
from polgrad.losses import aggregation
from polgrad.registry import part


def worked_sums(o, *, steps: int):
  return part(
    phase,
    steps=2 if o.smoke else steps,
    source=sums(size=2000, seed=0),
    collect=part(collect.demonstrations, rows=4 if o.smoke else 16, length=o.prompt_length + 10),
    objective=part(objectives.supervised, aggregation=part(aggregation.token_mean)),
    optimizer=part(optim.adamw, learning_rate=2e-4 if o.lora else 2e-5),
  )


def get_config(text: str = ''):
  o = hub_options(text, steps=40)
  return hub_experiment(o, {'sft': worked_sums(o, steps=o.steps)})
