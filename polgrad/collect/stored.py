"""Completions that were drawn before the run, with the log-probs of a teacher that is not there."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from polgrad import paths, stored_rows
from polgrad.collect.base import Collect, Context, Draw, Filtering, laid_out
from polgrad.collect.drawn import Drawn
from polgrad.collect.rollouts import Rollouts
from polgrad.collect.steps import PROVIDED, Steps, common
from polgrad.data import batching, tokenizers
from polgrad.data.sources import Source
from polgrad.data.tokenizers import Tokenizer
from polgrad.registry import Count
from polgrad.types import Batch, Prompts, TrainState

# Settings that decide what the files hold; the tokenizer is compared as well.
COMPARED = ('samples_per_prompt', 'max_new_tokens', 'temperature', 'top_k', 'top_p', 'prefix')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored(Filtering):
  """Reads the completions of a record, and the teacher's log-probs, from files of `teacher_logp`.

  Its settings are those of the sampler that drew them. A record has the same completions in every
  epoch. `staleness` counts batches since the first one of the phase.
  """

  # Folder of the files.
  path: str = ''
  # The sampler's log-probs are those of an old policy; `proximal_logp` is that of the live one.
  recompute_proximal: bool = True
  # Likeliest tokens of the teacher that the files list for each token; 0: they list none.
  top: Count = 0

  def __post_init__(self):
    super().__post_init__()
    if self.has_environment:
      raise ValueError('Stored: completions that were drawn before have no environment')
    if self.drafts:
      raise ValueError(
        f'Stored: speculate reads the anchor {self.drafts[0]!r}, but teacher_logp draws with the policy '
        'alone; take speculation.NGram or speculation.FirstLayers'
      )

  @property
  def provides(self) -> frozenset[str]:
    return PROVIDED | {'teacher_logp', *(stored_rows.LISTED if self.top else ())}

  @property
  def folder(self) -> str:
    return str(paths.path(self.path)) if self.path else ''

  @property
  def sampler(self) -> Rollouts:
    """The collector that draws what the files hold."""
    names = [field.name for field in dataclasses.fields(Filtering)]
    return Rollouts(**{name: getattr(self, name) for name in names})

  def settings(self, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the files must have been made with, see `stored_rows.SETTINGS`."""
    own = {name: getattr(self, name) for name in (*COMPARED, 'top')}
    return own | {'tokenizer': _digest(tokenizer), 'stop_strings': list(self.stop_strings)}

  @functools.cached_property
  def rows_of_files(self) -> stored_rows.Rows:
    return stored_rows.Rows(self.folder)

  def read_files(self, source: Source, tokenizer: Tokenizer) -> None:
    """Refuses files that lack a record of the source, other than one that the run drops."""
    rows = self.checked(tokenizer)
    wanted = [row for row in range(len(source)) if row not in rows]
    if batching.drops(self):
      fate = lambda row: batching.fate(self.sampler, {**source[row], 'id': row}, tokenizer)
      wanted = [row for row in wanted if fate(row) in ('kept', 'cut')]
    rows.check_complete(wanted)

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Prompts:
    prompts = super().lay_out(records, tokenizer=tokenizer, cut=cut)
    self.found(prompts, tokenizer)  # refuses a record without completions
    return prompts

  def found(self, prompts: Prompts, tokenizer: Tokenizer) -> list[stored_rows.Entry]:
    """The completions of each prompt.

    Raises:
      ValueError, FileNotFoundError: the files are damaged, were made with other settings, or lack one of
        the records; names the file.
    """
    files = self.checked(tokenizer)
    rows = zip(prompts.ids, prompts.tokens, prompts.mask, strict=True)
    return [files.read(int(i), stored_rows.digest(tokens[mask])) for i, tokens, mask in rows]

  def checked(self, tokenizer: Tokenizer) -> stored_rows.Rows:
    """The files, whose settings are those of the run; they may list more tokens than it reads.

    Raises:
      ValueError: names the file and the setting that differs.
    """
    settings = self.settings(tokenizer)
    settings['top'] = max(self.top, self.rows_of_files.top)
    self.rows_of_files.check(settings)
    return self.rows_of_files

  def make(self, context: Context) -> Collect:
    context = self.within(context)
    given = dict(recompute_proximal=self.recompute_proximal, provided=frozenset({'teacher_logp'}))
    return StoredSteps(settings=self, **common(self, context, **given)).collect


@functools.lru_cache(maxsize=4)
def _digest(tokenizer: Tokenizer) -> str:
  return tokenizers.digest(tokenizer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredSteps(Steps):
  """The steps of `Stored`."""

  settings: Stored

  def sample(self, state: TrainState, draw: Draw, step: int) -> tuple[Drawn, Sequence[dict]]:
    del state, step
    records = draw(self.settings.prompts)
    return Drawn(laid_out(self._read, records)), records

  def _read(self, records: Sequence[dict]) -> Batch:
    """The rows of the records, with what the files say of them."""
    settings, tokenizer = self.settings, self.context.tokenizer
    prompts = Filtering.lay_out(settings, records, tokenizer=tokenizer, cut=settings.cut)
    entries = settings.found(prompts, tokenizer)
    return batch_of(prompts, entries, settings.max_new_tokens, tokenizer, settings.top)

  def exchange(self, batch: Batch, memory: Any, random: np.random.Generator) -> tuple[Batch, Any]:
    del random
    return batch.replace(sampled_at=np.zeros_like(batch.sampled_at)), memory


def batch_of(
  prompts: Prompts,
  entries: Sequence[stored_rows.Entry],
  width: int,
  tokenizer: Tokenizer,
  top: int = 0,
) -> Batch:
  """The rows of these prompts as the sampler gives them, with what the files say of the teacher.

  Args:
    prompts: N of them.
    entries: of each prompt, with G samples each.
    width: columns of a completion.
    top: likeliest tokens of the teacher that are read for each token.
  """
  samples = [(i, sample) for i, one in enumerate(entries) for sample in range(len(one.tokens))]
  begin = prompts.tokens.shape[1]
  shape = (len(samples), begin + width)
  tokens = np.full(shape, tokenizer.pad_id, np.int32)
  mask = np.zeros(shape, bool)
  logp = {name: np.zeros(shape, np.float32) for name in ('behavior_logp', 'teacher_logp')}
  listed = {'teacher_top_ids': np.full((*shape, top), -1, np.int32)} if top else {}
  listed |= {'teacher_top_log_probs': np.zeros((*shape, top), np.float32)} if top else {}
  for row, (i, sample) in enumerate(samples):
    columns = slice(begin, begin + len(entries[i].tokens[sample]))
    tokens[row, :begin] = prompts.tokens[i]
    tokens[row, columns] = entries[i].tokens[sample]
    mask[row, columns] = True
    for name, x in logp.items():
      x[row, columns] = getattr(entries[i], name)[sample]
    for name, x in listed.items():
      x[row, columns] = getattr(entries[i], name)[sample][:, :top]
  owners = np.array([i for i, _ in samples])
  seen = mask.copy()
  seen[:, :begin] = prompts.mask[owners]
  return Batch(
    tokens=tokens,
    segment_ids=seen.astype(np.int32),
    mask=mask,
    finished=np.array([entries[i].finished[sample] for i, sample in samples], bool),
    prompt_ids=prompts.ids[owners],
    group_ids=owners.astype(np.int32),
    **logp,
  ).with_arrays(**{name: x.reshape(len(x), -1) for name, x in listed.items()})
