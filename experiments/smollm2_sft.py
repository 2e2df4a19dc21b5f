"""SFT on SmolLM2-135M-Instruct: token mean of -log pi over the answers of worked sums (standard).

Only the answers and the tokens that end them are trained, not the words of the chat template. With
`:lora=8` an adapter is trained (LoRA, arXiv:2106.09685) at ten times the learning rate. Options: path
(of the model's folder), lora, steps, smoke.

    python -m polgrad.train --config=experiments/smollm2_sft.py:path=FOLDER --workdir=runs/smollm2_sft

Measured on 2 shared CPU cores, float32, one seed, median 13 s a step: greedy accuracy on 64 held-out
problems (standard error 0.06) after 0, 10, 20, 30, 40 steps is 0.08, 0.33, 0.52, 0.64, 0.69. Mean loss
of ten steps at a time: 1.38, 0.84, 0.56, 0.46 nats a token.
"""

from polgrad import methods, presets, tasks
from polgrad.compose import compose
from polgrad.options import values


def get_config(text: str = ''):
  o = values(text, path='', lora=0, steps=40, smoke=False)
  model = presets.smollm2(path=o.path, lora=o.lora)
  return compose(methods.sft, tasks.chain_sum(), model, steps=o.steps, smoke=o.smoke)
