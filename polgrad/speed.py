"""How fast a run is: seconds and floating-point operations of its parts, and what the devices could do.

Operations are counted by a formula from the model's configuration, so they are those that the model
needs, and neither what a compiler makes of it nor what is computed twice to save memory. One product
and one addition are two operations (FLOPs).

    forward = 2 W n + 2 V D s + 4 H d sum_layers p
    update  = 3 forward, or with an adapter of A weights 2 forward + 4 H d sum_layers p + 2 A n

    W  weights of the matrices of all layers; of experts, those that a token passes
    n  tokens, without padding, the prompt of rows that share it once
    V, D, H, d  sizes of the vocabulary, the residual stream, the heads
    s  scored tokens, the only ones that need logits
    p  pairs of a token and a token that it sees, at most `window` of them in a local layer

The backward pass costs twice the forward pass: the gradients of activations and those of weights. A base
under an adapter needs only the former.
"""

import collections
import contextlib
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from polgrad.types import PLAIN, Batch, Layout

# Matrices of a layer that every token is multiplied with; those of EXPERTS once for each of its experts.
MATRICES = frozenset({'query', 'key', 'value', 'out', 'router', 'gate', 'up', 'down'})
EXPERTS = frozenset({'gate', 'up', 'down'})

# FLOPs a second of dense bfloat16 products with float32 sums (float16 for the V100), by words of
# `device_kind`; the first that occur in it count. Of a TPU v2 and v3 a device is one of two cores of a
# chip. The numbers are those that Google and NVIDIA publish; none was measured here.
PEAKS = {
  'TPU v2': 22.5e12,
  'TPU v3': 61.5e12,
  'TPU v4 lite': 138e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
  'GB200': 2500e12,
  'B200': 2250e12,
  'H200': 989e12,
  'GH200': 989e12,
  'H100 PCIe': 756e12,
  'H100 NVL': 835e12,
  'H100': 989e12,
  'H20': 148e12,
  'A100': 312e12,
  'A800': 312e12,
  'A10G': 70e12,
  'A10': 125e12,
  'A40': 149.7e12,
  'A6000': 154.8e12,
  'L40S': 362e12,
  'L40': 181e12,
  'L4': 121e12,
  'V100': 125e12,
  'RTX 3090': 71e12,
  'RTX 4090': 165.2e12,
  'RTX 5090': 209.5e12,
}


class Meter:
  """Seconds, operations and bytes of the named parts of a step; they add up until they are taken."""

  def __init__(self):
    self._seconds, self._flops = collections.Counter(), collections.Counter()
    self._bytes = collections.Counter()
    self._drawn = self._passes = 0
    self._parts: list[str] = []  # that are being timed, the innermost last
    self._since = 0.0

  @contextlib.contextmanager
  def timing(self, part: str) -> Iterator[None]:
    """Adds the time within to a part. An inner part stops the clock of the outer one."""
    self._lap()
    self._parts.append(part)
    try:
      yield
    finally:
      self._lap()
      self._parts.pop()

  def add(self, part: str, flops: float) -> None:
    """Adds operations to a part; NaN, of a model that has no formula, adds nothing."""
    if not math.isnan(flops):
      self._flops[part] += flops

  def move(self, part: str, tree: Any) -> None:
    """Adds the bytes of all copies of these arrays on the devices of this process."""
    shards = (s for x in jax.tree.leaves(tree) for s in x.addressable_shards)
    self._bytes[part] += sum(s.data.nbytes for s in shards)

  def passed(self, drawn: int, passes: int) -> None:
    """Adds drawn tokens, and the passes over rows that gave them, see `sampling.speculation`."""
    self._drawn, self._passes = self._drawn + drawn, self._passes + passes

  def take(self) -> dict[str, float]:
    """`seconds/PART`, `flops/PART` and `bytes/PART` since the last call.

    With speculative decoding also `speculation/passes`, the passes of the policy, counted for each row,
    and `speculation/tokens`, the mean number of tokens that one of them gave.
    """
    found = {f'seconds/{k}': v for k, v in self._seconds.items()}
    found |= {f'flops/{k}': float(v) for k, v in self._flops.items()}
    found |= {f'bytes/{k}': float(v) for k, v in self._bytes.items()}
    if self._passes:
      found['speculation/passes'] = float(self._passes)
      found['speculation/tokens'] = self._drawn / self._passes
    self._drawn = self._passes = 0
    for counter in (self._seconds, self._flops, self._bytes):
      counter.clear()
    return found

  def _lap(self) -> None:
    now = time.perf_counter()
    if self._parts:
      self._seconds[self._parts[-1]] += now - self._since
    self._since = now


class Profiler:
  """Writes an xprof trace of some steps, which shows what the devices and the host do at each time.

  Attributes:
    folder: where the trace goes.
    steps: the steps that are traced, consecutive ones; an empty range traces nothing.
  """

  def __init__(self, folder: str = '', steps: range = range(0)):
    self.folder, self.steps = folder, steps
    self._step: Any = None  # the annotation of a step that is being traced

  def begin(self, step: int) -> None:
    """Starts the trace at its first step."""
    if step not in self.steps:
      return
    if step == self.steps[0]:
      jax.profiler.start_trace(self.folder)
    self._step = jax.profiler.StepTraceAnnotation('step', step_num=step)
    self._step.__enter__()

  def end(self, step: int) -> None:
    """Ends the trace after its last step."""
    if self._step is None:
      return
    self._step.__exit__(None, None, None)
    self._step = None
    if step == self.steps[-1]:
      jax.profiler.stop_trace()
      print(f'a trace of steps {self.steps[0]} to {step} is in {self.folder}')


def parse_steps(text: str, first: int, last: int) -> range:
  """The steps that a text such as `10:12` means: 10 and 11; '' means none.

  Args:
    first, last: the run makes the steps from `first` on, before `last`.

  Raises:
    ValueError: the text means no steps, or some that the run does not make.
  """
  if not text:
    return range(0)
  found = re.fullmatch(r'(\d+):(\d+)', text)
  steps = range(int(found[1]), int(found[2])) if found else range(0)
  if not steps:
    raise ValueError(
      f'--profile_steps={text}: expected FIRST:END, such as 10:12 for steps 10 and 11'
    )
  if steps[0] < first or steps[-1] >= last:
    left = f'makes the steps {first} to {last - 1}' if first < last else 'has made all its steps'
    raise ValueError(f'--profile_steps={text}: this run {left}')
  return steps


def forward_flops(
  config: Any, batch: Batch, layout: Layout = PLAIN, *, logits: bool = True, layers: bool = True
) -> float:
  """Operations of one forward pass over the rows of a batch (NumPy), each of one sequence.

  NaN for a model that is no decoder of `models`, because nothing is known of its layers.

  Args:
    config: of the model, a `models.config.Config`.
    layout: says which rows share a prompt.
    logits: whether there are logits; a reward model has none.
    layers: whether there are layers; of a teacher on other devices there is the unembedding alone.
  """
  if not hasattr(config, 'layer'):
    return math.nan
  tokens, pairs = _tokens(batch, layout), _pairs(config, batch, layout)
  scored = float(np.sum(batch.mask))
  weights = sum(_used(config, name) for name in config.layer) * config.num_layers
  unembedding = 2.0 * config.vocab_size * config.width * scored if logits else 0.0
  of_layers = 2.0 * weights * tokens + _attention(config, pairs) if layers else 0.0
  return of_layers + unembedding


def update_flops(
  config: Any, batch: Batch, layout: Layout = PLAIN, *, logits: bool = True
) -> float:
  """Operations of the gradient of a loss over the rows of a batch; see `forward_flops`."""
  forward = forward_flops(config, batch, layout, logits=logits)
  if math.isnan(forward) or not config.lora_rank:
    return 3.0 * forward
  adapter = sum(math.prod(config.shape(name)) for name in config.adapter) * config.num_layers
  attention = _attention(config, _pairs(config, batch, layout))
  return 2.0 * forward + attention + 2.0 * adapter * _tokens(batch, layout)


def _used(config: Any, name: str) -> float:
  """Weights of a layer's parameter that a token is multiplied with."""
  if name not in MATRICES and name not in config.adapter:
    return 0.0
  fraction = config.experts_per_token / config.num_experts if config.num_experts else 1.0
  return math.prod(config.shape(name)) * (fraction if name in EXPERTS else 1.0)


def _attention(config: Any, pairs: float) -> float:
  """Scores and weighted values: two products of a head's size a pair of tokens."""
  return 4.0 * config.num_heads * config.head_dim * pairs


def _tokens(batch: Batch, layout: Layout) -> float:
  rows, prompts = _lengths(batch, layout)
  return float(rows.sum() - prompts.sum())


def _pairs(config: Any, batch: Batch, layout: Layout) -> float:
  """Pairs of tokens over all layers."""
  local = len(config.local_layers)
  total = 0.0
  for layers, window in ((config.num_layers - local, 0), (local, config.window)):
    if layers:
      seen = [_seen(lengths, window) for lengths in _lengths(batch, layout)]
      total += layers * (seen[0] - seen[1])
  return total


def _lengths(batch: Batch, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
  """Tokens of each row, and those of prompts that are forwarded with another row."""
  real = np.asarray(batch.segment_ids) > 0
  prompts = real[:, : layout.prompt_length].sum(axis=1).astype(float)
  first = np.arange(len(real)) % layout.shared == 0
  return real.sum(axis=1).astype(float), np.where(first, 0.0, prompts)


def _seen(lengths: np.ndarray, window: int) -> float:
  """Pairs in rows of these lengths where a token sees itself and those before it."""
  near = np.minimum(lengths, window) if window else lengths
  return float(np.sum(near * (near + 1) / 2 + (lengths - near) * near))


def peak_flops() -> float:
  """Operations a second that the devices of all processes could do; 0 where that is not known."""
  kind = jax.devices()[0].device_kind
  return peak_of(kind) * jax.device_count()


def peak_of(kind: str) -> float:
  """Operations a second of a device of this kind; 0 where it is not known."""
  return next((peak for name, peak in PEAKS.items() if re.search(rf'\b{name}\b', kind)), 0.0)


def peak_memory() -> dict[str, float]:
  """`peak_memory`, GiB in use at most so far, of the device that needed most; {} where none tells."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [found['peak_bytes_in_use'] for found in stats if 'peak_bytes_in_use' in found]
  return {'peak_memory': max(peaks) / 2**30} if peaks else {}


def utilization(found: dict[str, float], seconds: float, peak: float) -> dict[str, float]:
  """The fraction of the peak that model operations reach: `mfu` of a step and `mfu/PART` of its parts.

  Args:
    found: `seconds/PART` and `flops/PART`.
    seconds: of the whole step.
    peak: operations a second; 0 where it is not known, which gives {}.
  """
  flops = {k.partition('/')[2]: v for k, v in found.items() if k.startswith('flops/')}
  if not peak or not flops:
    return {}
  parts = {f'mfu/{k}': v / (found[f'seconds/{k}'] * peak) for k, v in flops.items()}
  return {'mfu': sum(flops.values()) / (seconds * peak), **parts}
