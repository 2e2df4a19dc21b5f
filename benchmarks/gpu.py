"""How near an update and decoding come to the limits of a GPU, beside plain PyTorch in the same run.

    python -m benchmarks.gpu                  # Qwen3-0.6B's shape, random bfloat16 weights
    python -m benchmarks.gpu --tiny           # a small shape, to try the script on any machine

The update's model FLOP utilisation is (6 N + 6 L H K T) FLOPs a token (attention looks at half of all
pairs) over `--peak` (H200: 989e12, dense bfloat16). Decoding reads all weights and the filled part of
the cache at every step; these bytes a second are set against the measured rate of a copy. PyTorch's
part, `transformers` with its own training step and `generate`, runs if `torch` can be imported.
"""

import argparse
import importlib.util
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from polgrad import compiling, learner, methods, models
from polgrad.compiling import jit
from polgrad.models import families
from polgrad.sampling import make_sampler
from polgrad.types import Batch, TrainState

QWEN = dict(
  vocab_size=151_936, num_layers=28, width=1024, num_heads=16, num_kv_heads=8, head_dim=128,
  mlp_width=3072, qk_norm='head', rope_theta=1e6, max_length=4096,
)  # fmt: skip
TINY = dict(
  vocab_size=512, num_layers=2, width=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=128,
  qk_norm='head', rope_theta=1e6, max_length=256,
)  # fmt: skip
# rows and length of the update; rows of decoding, prompt and new tokens
WORK = {'full': (8, 2048, (64, 256), 128, 256), 'tiny': (2, 64, (4, 8), 16, 16)}


def seconds(run: Callable, repeats: int = 5) -> float:
  """Median time of a call, after one that compiles."""
  spent = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(run())
    spent.append(time.perf_counter() - start)
  return statistics.median(spent[1:])


def copy_rate(size: int) -> float:
  """Bytes read and written a second by a copy."""
  x = jnp.zeros(size, jnp.float32)
  copy = jit(lambda x: x + 1)
  return 2 * x.nbytes / seconds(lambda: copy(x))


def update_seconds(shape: dict, rows: int, length: int) -> float:
  """An AdamW update with a supervised loss."""
  attention = 'cudnn' if jax.default_backend() == 'gpu' else 'einsum'
  policy = models.decoder(
    **shape, dtype='bfloat16', param_dtype='bfloat16', attention=attention, remat='none'
  )
  objective, optimizer = methods.sft().bound()[1], optax.adamw(1e-6)
  params = policy.init(jax.random.key(0))
  zero = jnp.int32(0)
  numbers = ('step', 'phase', 'phase_step', 'update', 'cursor', 'skipped')
  state = TrainState(
    **{n: zero + 0 for n in numbers},
    params=params,
    opt_state=optimizer.init(params),
    anchors={},
    collect_state=(),
    credit_state=(),
    objective_state=objective.init(),
  )
  tokens = jnp.asarray(
    np.random.default_rng(0).integers(2, shape['vocab_size'], (rows, length)), jnp.int32
  )
  ones = jnp.ones_like(tokens)
  batch = Batch(tokens=tokens, segment_ids=ones, mask=ones > 0)
  update = jit(learner.Learner(policy, objective, optimizer).update, donate_argnums=0)

  def run():
    nonlocal state
    state, report = update(state, batch)
    return report

  return seconds(run)


def decode_seconds(shape: dict, rows: int, width: int, new: int) -> float:
  """A rollout without a stop token."""
  policy = models.decoder(**shape, dtype='bfloat16', param_dtype='bfloat16')
  params = policy.init(jax.random.key(0))
  sample = make_sampler({'policy': policy}, max_new_tokens=new)
  prompts = np.random.default_rng(0).integers(2, shape['vocab_size'], (rows, width))
  arrays = prompts.astype(np.int32), np.ones_like(prompts, bool), np.arange(rows)
  return seconds(lambda: sample({'policy': params}, *arrays, seed=0, step=0).tokens, 3)


def torch_part(shape: dict, work: tuple) -> dict[str, float]:
  """The same by `transformers`: seconds of a training step and of `generate`."""
  import torch
  import transformers

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
  settings = families.write_settings(models.decoder(**shape).config)
  config = transformers.AutoConfig.for_model(**settings | {'eos_token_id': None, 'pad_token_id': 0})
  model = transformers.AutoModelForCausalLM.from_config(config).to(device, torch.bfloat16)
  rows, length, batches, width, new = work
  draw = lambda *size: torch.randint(2, shape['vocab_size'], size, device=device)

  def timed(run, repeats):
    spent = []
    for _ in range(repeats + 1):
      start = time.perf_counter()
      run()
      wait()
      spent.append(time.perf_counter() - start)
    return statistics.median(spent[1:])

  found = {}
  with torch.no_grad():
    for n in batches:
      ids = draw(n, width)
      generate = lambda ids=ids: model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=new
      )
      found[f'decode {n}'] = timed(generate, 3)
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
  tokens = draw(rows, length)

  def step():
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

  return found | {'update': timed(step, 5)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--tiny', action='store_true')
  parser.add_argument('--peak', type=float, default=989e12)
  parser.add_argument('--torch', action='store_true', help='run the PyTorch part alone')
  given = parser.parse_args()
  shape = TINY if given.tiny else QWEN
  work = rows, length, batches, width, new = WORK['tiny' if given.tiny else 'full']
  if given.torch:
    print(json.dumps(torch_part(shape, work)))
    return
  peer = {}
  if importlib.util.find_spec('torch'):  # first, and in a process that gives its memory back
    flags = ['--torch', *(['--tiny'] if given.tiny else [])]
    program = [sys.executable, '-m', 'benchmarks.gpu', *flags]
    root = pathlib.Path(__file__).parent.parent
    out = subprocess.run(program, cwd=root, capture_output=True, text=True, check=True).stdout
    peer = json.loads(out.splitlines()[-1])
  beside = lambda name: f'; PyTorch {peer[name]:.3f} s' if name in peer else ''
  rate = copy_rate(2**20 if given.tiny else 2**29)
  print(f'{jax.devices()[0].device_kind}: a copy moves {rate / 1e9:.0f} GB/s')
  shapes = jax.tree.leaves(models.decoder(**shape).shapes())
  parameters = sum(p.size for p in shapes)
  heads = shape['num_heads'] * shape['head_dim']
  took = update_seconds(shape, rows, length)
  flops = (6 * parameters + 6 * shape['num_layers'] * heads * length) * rows * length
  print(
    f'update of {rows} x {length}: {took:.3f} s, {flops / took / given.peak:.1%} of the peak'
    + beside('update')
  )
  for n in batches:
    took = decode_seconds(shape, n, width, new)
    column = 2 * shape['num_layers'] * shape['num_kv_heads'] * shape['head_dim'] * 2
    moved = new * (2 * parameters + n * (width + new / 2) * column)
    print(
      f'decode {n} rows, {new} tokens: {took:.3f} s, {n * new / took:.0f} tokens/s, '
      f'{moved / took / rate:.1%} of the copy' + beside(f'decode {n}')
    )


if __name__ == '__main__':
  compiling.prepare()
  compiling.in_one_chunk(main)()
