"""Draws the rows of prompts with one behavior policy."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from polgrad.collect.base import Context, Sampling, draws_of, laid_out
from polgrad.collect.drawn import Drawn, Draws
from polgrad.collect.scored import distinct
from polgrad.learner import parameter_sets
from polgrad.registry import inputs
from polgrad.sampling import behavior_policies, processors
from polgrad.sharding import to_host
from polgrad.types import Prompts, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSampler:
  """Samples completions of records with one behavior policy."""

  context: Context
  lay_out: Callable[[Sequence[dict]], Prompts]
  samples_per_prompt: int
  reads: tuple[str, ...]  # parameter sets of the behavior policy
  draw: Draws
  measures: bool = False  # whether the sampler reads entropies of the batch before

  def __call__(
    self, state: TrainState, records: Sequence[dict], step: int, before: Sequence[int] = ()
  ) -> Drawn:
    """Completions of the records, or episodes that begin with them.

    Args:
      before: ids of records whose completions the step has drawn already: noise is not drawn again.
    """
    context = self.context
    prompts = laid_out(self.lay_out, records)
    params = parameter_sets(state, context.frozen)
    rows = self.draw(
      {name: params[name] for name in self.reads} | levels_of(state, self.measures),
      prompts,
      records,
      distinct(prompts.ids, before),
      seed=context.seed,
      step=step,
    )
    # The sampler got ids that differ where a prompt is there twice.
    ids = np.repeat(prompts.ids, self.samples_per_prompt)
    return rows._replace(batch=rows.batch.replace(prompt_ids=ids))


def make_row_sampler(
  settings: Sampling,
  context: Context,
  samples_per_prompt: int,
  behavior_policy: Callable = behavior_policies.current,
  token_temperature: Callable = processors.unchanged,
) -> RowSampler:
  """The `RowSampler` of a collector whose records are prompts.

  Args:
    context: of `Sampling.within`.
    samples_per_prompt: rows of each record.
    behavior_policy: who samples.
    token_temperature: of each token, see `processors.TABLE`.
  """
  tokenizer, cut = context.tokenizer, settings.cut
  measures = 'entropy_levels' in inputs(token_temperature)
  return RowSampler(
    context=context,
    # Prompts alone: `Rollouts.lay_out` would lay out the demonstrations too.
    lay_out=functools.partial(Sampling.lay_out, settings, tokenizer=tokenizer, cut=cut),
    samples_per_prompt=samples_per_prompt,
    reads=(*behavior_policies.models_read(behavior_policy), *settings.drafts),
    draw=draws_of(
      settings,
      context,
      samples_per_prompt=samples_per_prompt,
      behavior_policy=behavior_policy,
      **({'token_temperature': token_temperature} if measures else {}),
    ),
    measures=measures,
  )


def levels_of(state: TrainState, measures: bool) -> dict[str, np.ndarray]:
  """What the sampler reads of the batch before, beside its parameter sets."""
  return {'entropy_levels': to_host(state.collect_state.entropy_levels)} if measures else {}
