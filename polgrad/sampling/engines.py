"""Who draws completions: polgrad's own sampler, or another program that gets the weights of each step.

    --config.engine.name=engines.Vllm --config.engine.python=~/vllm/bin/python

An engine is a slot of the configuration. `sampler` makes a function of the same form as
`sampler.make_sampler`: parameters and prompts as ids -> rows with ids and `behavior_logp`.
"""

import abc
import dataclasses
import functools
import math
import pathlib
import shutil
import subprocess
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np

from polgrad.models import families, heads, hf
from polgrad.models.lora import merge
from polgrad.models.policy import Policy
from polgrad.models.quantized import quantize_params
from polgrad.models.transformer import sampled
from polgrad.registry import AtLeastOne, Count, Positive, table, unbound
from polgrad.sampling import behavior_policies, processors
from polgrad.sampling.engine_process import EngineError, Process
from polgrad.sampling.sampler import laid_out, make_sampler
from polgrad.types import Batch, Params

WORKER = pathlib.Path(__file__).with_name('vllm_worker.py')
LARGEST_LOGP = 1e-3  # nats: a log-prob above 0 by more than rounding is none
# Settings of collectors that an external engine has no counterpart for, and why.
UNKNOWN = {
  'environment': 'draws one turn',
  'stop_strings': 'knows stop tokens, and no texts',
  'slots': 'fills its own batch',
  'in_flight': 'finishes the rows that it begins',
  'speculate': 'decodes by itself',
}
# Settings of collectors that say who is drawn from, and those that say whether it is drawn at all.
INSTALL = 'docs/engines.md says how to install it'
POLICIES = {
  'behavior_policy': None,
  'baseline_policy': 'baseline_samples',
  'opponent_policy': 'opponents',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own:
  """polgrad's sampler: one program on the devices of the run.

  With fewer bits than the trainer has, its log-probs are those of the rounded model that draws, and
  differ from the trainer's (docs/engines.md).
  """

  # Of its activations, and of its other weights; '' is that of the model.
  dtype: Literal['', 'float32', 'bfloat16'] = ''
  # Of the matrices: 8 bits with a scale for each output, rounded anew before each rollout.
  weights: Literal['', 'int8', 'float8'] = ''
  # Of keys and values: 8 bits with a scale for each token and head.
  cache: Literal['', 'int8', 'float8'] = ''
  # A step of decoding is a loop over the layers, or has all of them unrolled; '' is 'loop' on TPUs, and
  # 'unrolled' elsewhere. Prompts are always read by a loop.
  layers: Literal['', 'loop', 'unrolled'] = ''

  def drawn_from(self, policy: Policy) -> Policy:
    """The policy as it is computed in rollouts."""
    types = dict(dtype=self.dtype, weights=self.weights, cache=self.cache)
    return sampled(policy, **types, looped=self.layers == 'loop' if self.layers else None)

  def rounded(self, policy: Policy) -> Callable[[Params], Params]:
    """What makes of parameters of a policy, or of a part of the tree, those that other devices get."""
    return functools.partial(quantize_params, config=policy.config, kind=self.weights)

  def sampler(self, policies: Mapping[str, Policy], **settings: Any) -> Callable[..., Batch]:
    """See `make_sampler`."""
    return make_sampler(policies, **settings)

  def check(self, collector: Any, path: str) -> None:
    """It does all that a collector may ask for."""

  def check_there(self, policy: Policy, path: str) -> None:
    """It is always there, and samples from all models."""

  def take(self) -> dict[str, float]:
    """Metrics since the last call."""
    return {}


OWN = Own()


@dataclasses.dataclass(frozen=True, kw_only=True)
class External(abc.ABC):
  """An engine in a process of another environment: the settings of all of them.

  The process starts with the first rollout. It gets the weights whenever they have changed, as one file
  of safetensors, and gives tokens with their log-probs. If it dies, does not answer in time, or answers
  with what cannot be right, it is killed and started again, and the same rows are asked for.
  """

  # Of the engine's computation, and of the weights that it gets.
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  # Tokens of its longest row; 0 takes the limit of the model.
  max_length: Count = 0
  # Seconds that it may take to start with the first weights, to take other weights, and for a rollout.
  start_s: Positive = 900.0
  weights_s: Positive = 300.0
  rollout_s: Positive = 1800.0
  # How often the rows of a step are asked for again, by a new process.
  retries: Count = 1
  # Where weights are handed over; '' is /dev/shm, or the folder for temporary files.
  folder: str = ''
  # Variables of the process' environment, such as the devices that it may use.
  variables: dict = dataclasses.field(default_factory=dict)

  def drawn_from(self, policy: Policy) -> Policy:
    """The policy: how it is computed, the engine knows."""
    return policy

  def rounded(self, policy: Policy) -> Callable[[Params], Params]:
    """Parameters are handed over as files, see `write`."""
    del policy
    return lambda params: params

  @property
  @abc.abstractmethod
  def command(self) -> list[str]:
    """Program and arguments of the process, see `engine_process.Process`."""

  @abc.abstractmethod
  def settings(self, max_length: int) -> dict[str, Any]:
    """What the engine is started with."""

  @property
  def environment(self) -> dict[str, str]:
    """Variables of the process, besides those of the trainer."""
    return {name: str(value) for name, value in self.variables.items()}

  @abc.abstractmethod
  def check_installed(self, path: str) -> None:
    """Refuses an engine that is not installed, before a run. `path` is that of the engine."""

  def check_there(self, policy: Policy, path: str) -> None:
    """Refuses an engine that is not installed or reads longer rows than the model, and a model that no
    folder can hold.

    Raises:
      ValueError, FileNotFoundError: says what is missing; begins with `path`.
    """
    self.check_installed(path)
    if self.folder and not pathlib.Path(self.folder).is_dir():
      raise FileNotFoundError(f'{path}.folder: there is no folder {self.folder!r}')
    if self.max_length > policy.config.max_length:
      raise ValueError(
        f'{path}.max_length: {self.max_length} tokens, but the model has {policy.config.max_length}'
      )
    try:
      families.write_settings(policy.config, False)
    except ValueError as error:
      raise ValueError(f'{path}: the model cannot be handed over: {error}') from error

  @functools.cached_property
  def served(self) -> 'Served':
    """The process, with what is known of it."""
    return Served(self)

  def take(self) -> dict[str, float]:
    """Metrics since the last call: seconds and MiB of the weights that were sent, restarts."""
    return self.served.take()

  def check(self, collector: Any, path: str) -> None:
    """Refuses settings of a collector that an external engine does not know.

    Raises:
      ValueError: names the setting.
    """
    if jax.process_count() > 1:
      raise ValueError('config.engine: an external engine needs one process of the trainer')
    if self.max_length and collector.length > self.max_length:
      raise ValueError(
        f'{path}: rows of {collector.length} tokens, but config.engine.max_length is {self.max_length}'
      )
    drawn = {
      name: getattr(collector, name)
      for name, count in POLICIES.items()
      if hasattr(collector, name) and (count is None or getattr(collector, count))
    }
    others = {name: getattr(collector, name, 0) for name in UNKNOWN}
    others['environment'] = collector.has_environment
    others['speculate'] = getattr(collector, 'proposer', None)
    heat = getattr(collector, 'token_temperature', processors.unchanged)
    self.refuse(path, drawn, token_temperature=heat, **others)

  def refuse(
    self, path: str, drawn: Mapping[str, Callable], *, token_temperature: Callable, **others: Any
  ) -> None:
    """Refuses settings of a sampler, see `check`.

    Args:
      path: of the settings, for errors.
      drawn: behavior policies by the names of their settings.
      others: of `UNKNOWN`.
    """
    found = {name: UNKNOWN[name] for name, value in others.items() if value}
    if unbound(token_temperature) is not processors.unchanged:
      found['token_temperature'] = 'has one temperature for all tokens'
    for name, policy in drawn.items():
      if unbound(policy) not in (behavior_policies.current, behavior_policies.greedy):
        other = unbound(policy).__name__
        found[name] = f'draws from the policy, or greedily, not from {other}'
    for name, why in found.items():
      kind = type(self).__name__
      raise ValueError(f'{path}.{name}: {kind} {why}; leave it out, or use engines.Own')

  def sampler(
    self,
    policies: Mapping[str, Policy],
    *,
    max_new_tokens: int,
    behavior_policy: Callable = behavior_policies.current,
    default: Policy | None = None,
    samples_per_prompt: int = 1,
    slots: int = 0,
    stop_ids: Sequence[int] = (),
    stop_table: Any = None,
    pad_id: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    token_temperature: Callable = processors.unchanged,
    mesh: Any = None,
  ) -> Callable[..., Batch]:
    """As `make_sampler`, whose settings these are; rows are NumPy.

    Each row has its own seed, folded from (seed, step, prompt id, sample index).
    """
    del mesh  # the engine has its own devices
    self.refuse(
      'collect', {'behavior_policy': behavior_policy}, token_temperature=token_temperature,
      stop_strings=stop_table, slots=slots,
    )  # fmt: skip
    greedy = unbound(behavior_policy) is behavior_policies.greedy
    policy = policies.get('policy', default)
    wanted = dict(
      max_tokens=max_new_tokens,
      temperature=0.0 if greedy else temperature,
      top_k=0 if greedy else top_k,
      top_p=1.0 if greedy else top_p,
      stop_token_ids=sorted({int(i) for i in stop_ids}),
    )

    def sample(params: Mapping[str, Params], tokens, mask, prompt_ids, *, seed, step) -> Batch:
      tokens, mask = np.asarray(tokens), np.asarray(mask)
      prompts = [row[seen].tolist() for row, seen in zip(tokens, mask)]
      seeds = row_seeds(int(seed), int(step), prompt_ids, samples_per_prompt)
      own = [seeds[i : i + samples_per_prompt] for i in range(0, len(seeds), samples_per_prompt)]
      request = dict(prompts=prompts, seeds=own, settings=wanted)
      read = functools.partial(
        completions, rows=len(seeds), most=max_new_tokens, stops=set(wanted['stop_token_ids']),
        vocabulary=policy.config.vocab_size,
      )  # fmt: skip
      rows = self.served.sample(policy, params['policy'], request, read)

      made = np.full((len(rows), max_new_tokens), pad_id, np.int32)
      logp, drawn = np.zeros(made.shape, np.float32), np.zeros(made.shape, bool)
      finished = np.zeros(len(rows), bool)
      for i, (ids, values) in enumerate(rows):
        made[i, : len(ids)], drawn[i, : len(ids)] = ids, True
        logp[i, : len(ids)] = 0 if greedy else np.minimum(values, 0)
        finished[i] = ids[-1] in read.keywords['stops']
      sizes = dict(pad_id=pad_id, samples=samples_per_prompt)
      return laid_out(tokens, mask, prompt_ids, made, logp, drawn, finished, **sizes)

    return sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vllm(External):
  """vLLM, in an environment that has it (docs/engines.md)."""

  # The Python of that environment.
  python: str
  # Rows that it decodes at a time.
  rows: AtLeastOne = 256
  # GiB of the keys and values of these rows, where it runs on a CPU. On others it takes what is free.
  cache_gib: AtLeastOne = 4
  # False compiles its model when it starts, which takes longer and decodes faster.
  eager: bool = False
  # Further arguments of `vllm.LLM`, such as `tensor_parallel_size`.
  options: dict = dataclasses.field(default_factory=dict)

  @property
  def _python(self) -> str:
    return str(pathlib.Path(self.python).expanduser())

  @property
  def command(self) -> list[str]:
    # Isolated: modules of the trainer's environment would shadow its own.
    return [self._python, '-I', str(WORKER)]

  def settings(self, max_length: int) -> dict[str, Any]:
    own = dict(dtype=self.dtype, max_model_len=max_length, max_num_seqs=self.rows)
    return own | dict(enforce_eager=self.eager) | self.options

  @property
  def environment(self) -> dict[str, str]:
    """Variables of the process."""
    found = {'VLLM_CPU_KVCACHE_SPACE': str(self.cache_gib), 'VLLM_NO_USAGE_STATS': '1'}
    # On the cores of the trainer, threads of both that wait for work must not spin or be pinned.
    found |= {'VLLM_CPU_OMP_THREADS_BIND': 'nobind', 'OMP_WAIT_POLICY': 'passive'}
    return found | super().environment

  def check_installed(self, path: str) -> None:
    """Refuses an environment without vLLM.

    Raises:
      FileNotFoundError: there is no such Python.
      ValueError: it does not find vLLM.
    """
    if shutil.which(self._python) is None:
      raise FileNotFoundError(f'{path}.python: there is no Python {self.python!r}; {INSTALL}')
    look = 'import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)'
    done = subprocess.run([self._python, '-I', '-c', look], capture_output=True, timeout=120)
    if done.returncode:
      raise ValueError(f'{path}.python: {self.python!r} finds no vLLM; {INSTALL}')


class Served:
  """The process of an external engine: which weights it has, and what it has cost."""

  def __init__(self, engine: External):
    self.engine = engine
    self.process: Process | None = None
    self.sent: list[weakref.ref] = []  # the arrays whose values it has
    self.lock = threading.Lock()
    self.seconds = self.mib = self.restarts = 0.0

  def take(self) -> dict[str, float]:
    with self.lock:
      found = dict(weights_s=self.seconds, weights_mib=self.mib, restarts=self.restarts)
      self.seconds = self.mib = self.restarts = 0.0
    return {f'engine/{name}': value for name, value in found.items()}

  def sample(self, policy: Policy, params: Params, request: dict, read: Callable) -> Any:
    """What `read` makes of the engine's reply to a request, under these parameters.

    Raises:
      RuntimeError: the engine refuses, or fails `retries` times more; says why.
    """
    with self.lock:
      for left in reversed(range(self.engine.retries + 1)):
        try:
          self._send(policy, params)
          return read(self.process.ask(self.engine.rollout_s, do='sample', **request))
        except EngineError as error:
          self.stop()
          if error.kind == 'Refused' or not left:
            raise RuntimeError(
              f'config.engine: {type(self.engine).__name__}: {error}\nNothing of the step is kept; the '
              'run can be resumed from its last checkpoint'
            ) from error
          said = f'the engine is started again, and asked for the same rows: {error}'
          warnings.warn(said, stacklevel=2)
          self.restarts += 1
        except BaseException:  # such as an interruption: a reply may be under way
          self.stop()
          raise

  def stop(self) -> None:
    """Kills the process, if there is one."""
    process, self.process, self.sent = self.process, None, []
    if process is not None:
      process.close()

  def _send(self, policy: Policy, params: Params) -> None:
    """Starts the process if there is none, and gives it the parameters if it has others."""
    leaves = jax.tree.leaves(params)
    if len(self.sent) == len(leaves) and all(x() is y for x, y in zip(self.sent, leaves)):
      return
    engine, begin, start = self.engine, time.perf_counter(), self.process is None
    if start:
      self.process = Process(engine.command, engine.environment, engine.folder)
    folder = self.process.folder / 'weights'
    count, size = write(folder, policy, params, engine.dtype)
    if start:
      settings = engine.settings(engine.max_length or policy.config.max_length)
      own = dict(do='start', folder=str(folder), settings=settings)
      self.process.ask(engine.start_s, **own)
    else:
      reply = self.process.ask(engine.weights_s, do='weights', folder=str(folder))
      if reply.get('tensors') != count:
        raise EngineError('BadReply', f'{count} tensors were sent, it has read {reply!r:.80}')
    shutil.rmtree(folder)
    self.sent = [weakref.ref(x) for x in leaves]
    self.seconds += time.perf_counter() - begin
    self.mib += size / 2**20


def write(folder: pathlib.Path, policy: Policy, params: Params, dtype: str) -> tuple[int, int]:
  """Writes config.json and model.safetensors of a policy, without its heads and with its adapter merged.

  Returns:
    How many tensors these are, and their bytes.
  """
  config, params = policy.config, heads.without_head(params)
  if config.lora_rank:
    config, params = merge(config, params)
  return hf.write_bare(folder, config, params, dtype)


def completions(
  reply: Mapping[str, Any], *, rows: int, most: int, vocabulary: int, stops: set[int]
) -> list[tuple[list[int], list[float]]]:
  """Ids and log-probs of the rows of a reply.

  Args:
    reply: of an engine to `sample`.
    rows: how many there must be.
    most: tokens of the longest completion.
    vocabulary: ids that the model has. An engine may have rounded their number up.
    stops: ids that end a completion.

  Raises:
    EngineError: rows that no sampler can have drawn; says which.
  """
  found = reply.get('rows')
  if not isinstance(found, list) or len(found) != rows:
    said = len(found) if isinstance(found, list) else f'{found!r:.40}'
    raise EngineError('BadReply', f'{rows} rows were asked for, the reply has {said}')
  return [_completion(row, f'row {i}', most, vocabulary, stops) for i, row in enumerate(found)]


def _completion(
  row: Any, name: str, most: int, vocabulary: int, stops: set[int]
) -> tuple[list[int], list[float]]:
  """Ids and log-probs of one row."""
  ids, logp = (row.get(key) if isinstance(row, dict) else None for key in ('tokens', 'logp'))
  if not isinstance(ids, list) or not isinstance(logp, list) or len(ids) != len(logp):
    raise EngineError('BadReply', f'{name} must have as many tokens as logp, got {row!r:.80}')
  odd = [i for i in ids if type(i) is not int or not 0 <= i < vocabulary]
  if odd:
    raise EngineError('BadReply', f'{name} has the token {odd[0]!r}, of {vocabulary} ids')
  wrong = [x for x in logp if not isinstance(x, float | int) or not math.isfinite(x)]
  wrong += [x for x in logp if not wrong and x > LARGEST_LOGP]
  if wrong:
    raise EngineError('BadReply', f'{name} has the log-prob {wrong[0]!r:.40}')
  if not 0 < len(ids) <= most or stops.intersection(ids[:-1]):
    raise EngineError('BadReply', f'{name} has {len(ids)} tokens of {most}, or some behind its end')
  if len(ids) < most and ids[-1] not in stops:
    raise EngineError('BadReply', f'{name} ends after {len(ids)} of {most} tokens, without a stop')
  return ids, logp


def row_seeds(seed: int, step: int, ids: Sequence[int], samples_per_prompt: int) -> list[int]:
  """One number in [0, 2**31) for each row: a resumed run draws the same ones.

  >>> row_seeds(0, 3, [7], 2) == row_seeds(0, 3, [5, 7], 2)[2:]
  True
  """
  fold = lambda i, sample: np.random.SeedSequence((seed % 2**32, step, i, sample))
  return [
    int(fold(int(i), sample).generate_state(1)[0] >> 1)
    for i in ids
    for sample in range(samples_per_prompt)
  ]


TABLE = table('engines', Own, Vllm)
Part = Annotated[Own | External, TABLE]
