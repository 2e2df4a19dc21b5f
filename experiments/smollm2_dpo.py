"""SFT, then DPO (arXiv:2305.18290) with beta = 0.1, on SmolLM2-135M-Instruct.

Pairs are the right answer and the answer with one digit changed, after the same prompt. With `:lora=8`
the reference costs no second copy of the model, because it shares the base (LoRA, arXiv:2106.09685).
Options: path (of the model's folder), lora, steps, smoke.

    python -m polgrad.train --config=experiments/smollm2_dpo.py:path=FOLDER --workdir=runs/smollm2_dpo

Measured on 2 shared CPU cores, float32, one seed, median 16 s a supervised step and 24 s a DPO step:
greedy accuracy on 64 held-out problems (standard error 0.06) is 0.08 at first, 0.52 after 20 supervised
steps, and 0.56 and 0.61 after 10 and 20 DPO steps, whose loss falls from 0.69 to 0.37.
"""

from polgrad import methods, presets, tasks
from polgrad.compose import compose
from polgrad.options import values


def get_config(text: str = ''):
  o = values(text, path='', lora=0, steps=20, smoke=False)
  model = presets.smollm2(path=o.path, lora=o.lora)
  return compose(methods.dpo, tasks.chain_sum(), model, steps=o.steps, warm_start=20, smoke=o.smoke)
