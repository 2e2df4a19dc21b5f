"""Tries verifiers on texts of which it is known whether they are right.

Each record is judged with its own answer, which should get a high number, and with an empty text and
the answer of another record, which should get a low one. The bare answer is tried, and also forms
that verifiers ask for: what the verifier's `pattern` wants around it, `<answer>`, `####`, `\\boxed{}`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polgrad.checks.duplicates import normalised
from polgrad.checks.findings import Finding, some
from polgrad.data.sources import spaced
from polgrad.registry import Weighted, inputs, name_of, unbound
from polgrad.rewards import verifiers as ours
from polgrad.rewards.scoring import Scores

Form = Callable[[str], str]  # answer -> completion that has it
BARE = 'the bare answer'
COMMON = {
  '<think>...</think> ...': '<think>\nSo.\n</think>\n{}',
  '<think>...</think> <answer>...</answer>': '<think>\nSo.\n</think>\n<answer>{}</answer>',
  '<answer>...</answer>': '<answer>{}</answer>',
  '#### ...': '#### {}',
  '\\boxed{...}': '\\boxed{{{}}}',
  'Answer: ...': 'Answer: {}',
}
TRIED = 8  # records on which the forms are compared


class Verdict(NamedTuple):
  """What a verifier, or the whole reward, said of texts that are known to be right or wrong."""

  name: str  # of the verifier; `TOTAL` is the weighted sum of all
  form: str  # in which the answers were given
  rows: tuple[int, ...]  # of the source
  tells_apart: bool  # whether right answers get more than wrong ones at all
  refused: tuple[int, ...]  # rows whose own answer it refuses
  accepted_empty: tuple[int, ...]  # rows for which it accepts an empty text
  accepted_other: tuple[int, ...]  # rows for which it accepts the answer of another record
  errors: tuple[int, ...]  # rows on which it failed
  forms: tuple[str, ...] = ()  # all that were tried, where none was accepted
  own: bool = False  # a function of the user's, which may ask for a form that was not tried


TOTAL = 'the reward'


class Canary(NamedTuple):
  """The verdicts of a section, and what else was noticed."""

  verdicts: tuple[Verdict, ...]
  notes: tuple[str, ...]  # why verifiers were not tried
  answers: Mapping[int, str]  # by row
  messages: tuple[str, ...]  # of verifiers that failed


def field_of(reward: Mapping[str, Any]) -> str:
  """The field of a record that holds its answer, by the knobs of the verifiers that compare with it."""
  knobs = [getattr(_function(one), 'keywords', {}) for one in reward.values()]
  return next((k['field'] for k in knobs if 'field' in k), 'answer')


def _function(one: Any) -> Callable:
  return one.fn if isinstance(one, Weighted) else one


def forms_of(reward: Mapping[str, Any]) -> dict[str, Form]:
  """The forms that answers are tried in, by what they are called."""
  found = {BARE: lambda answer: answer}
  for one in reward.values():
    fn = _function(one)
    pattern = getattr(fn, 'keywords', {}).get('pattern', '')
    if pattern and unbound(fn) is not ours.regex_format:
      made = from_pattern(pattern)
      if made and made('x') != 'x':
        found[f'the form of {pattern!r}'] = made
  taken = {form('x') for form in found.values()}
  more = {name: text.format for name, text in COMMON.items() if text.format('x') not in taken}
  return found | more


def from_pattern(pattern: str) -> Form | None:
  """A form that a regular expression finds: its literal parts, with the answer as its first group.

  None if it has no group, or parts that have no obvious text.
  """
  try:
    texts = _literal(re._parser.parse(pattern, re.DOTALL))
  except (re.error, ValueError):
    return None
  before, group, after = texts.partition('\0')
  return (lambda answer: before + answer + after) if group else None


def _literal(parsed: Iterable) -> str:
  """The shortest obvious text that a parsed expression matches, with NUL as its first group."""
  text = ''
  for kind, value in parsed:
    kind = str(kind)
    if kind == 'LITERAL':
      text += chr(value)
    elif kind == 'SUBPATTERN':
      text += '\0' if value[0] == 1 else _literal(value[-1])
    elif kind in ('MAX_REPEAT', 'MIN_REPEAT'):
      text += _literal(value[2]) * value[0]
    elif kind == 'BRANCH':
      text += _literal(value[1][0])
    elif kind == 'IN' and str(value[0][0]) == 'CATEGORY':
      text += {'CATEGORY_SPACE': ' ', 'CATEGORY_DIGIT': '0'}.get(str(value[0][1]), 'a')
    elif kind == 'IN' and str(value[0][0]) in ('LITERAL', 'RANGE'):
      text += chr(value[0][1] if str(value[0][0]) == 'LITERAL' else value[0][1][0])
    elif kind == 'ANY':
      text += 'a'
    elif kind not in ('AT', 'ASSERT_NOT'):
      raise ValueError(f'no obvious text for {kind}')
  return text


def others(answers: Sequence[str]) -> list[str | None]:
  """For each answer another one, that of a later record; None if all are the same."""
  found = []
  for i, own in enumerate(answers):
    later = (answers[(i + step) % len(answers)] for step in range(1, min(len(answers), 50)))
    found.append(next((text for text in later if not _same(text, own)), None))
  return found


def _same(a: str, b: str) -> bool:
  """Whether two answers are one, as texts or as numbers."""
  if normalised(a) == normalised(b):
    return True
  try:
    return float(a) == float(b)
  except ValueError:
    return False


def try_verifiers(
  reward: Mapping[str, Any],
  judge: Callable[[Sequence[str], Sequence[Mapping]], Scores],
  records: Sequence[tuple[int, Mapping]],
) -> Canary:
  """Lets the verifiers of a section judge right and wrong texts.

  Args:
    reward: the verifiers by name.
    judge: (completions, records) -> Scores of these verifiers.
    records: (row, record) of those that are tried.
  """
  field = field_of(reward)
  told = [(row, record) for row, record in records if record.get(field) is not None]
  judging = {name: one for name, one in reward.items() if 'record' in inputs(_function(one))}
  notes = [f'{name}: judges no answer, only the text' for name in reward.keys() - judging.keys()]
  if judging and not told:
    notes.append(f'the records have no {field!r}, so nothing is known to be right')
  if not judging or not told:
    return Canary((), tuple(sorted(notes)), {}, ())
  rows = [row for row, _ in told]
  texts = [str(record[field]) for _, record in told]

  # Compare the forms on a few records, and take for each verifier the one that it likes best.
  few = spaced(len(told), TRIED)
  forms, gains = forms_of(reward), {}
  blank = _values(judge([''] * len(few), [told[i][1] for i in few]))
  for name, form in forms.items():
    values = _values(judge([form(texts[i]) for i in few], [told[i][1] for i in few]))
    gains[name] = {who: np.nanmean([0, *np.sign(x - blank[who])]) for who, x in values.items()}
    if all(gain * (len(few) + 1) >= len(few) for gain in gains[name].values()):
      break
  best = {who: max(gains, key=lambda n, who=who: gains[n][who]) for who in (*judging, TOTAL)}

  # All records, in the forms that were chosen.
  all_records, other = [record for _, record in told], others(texts)
  empty, messages = _values(found := judge([''] * len(told), all_records)), [*found.messages]
  right, wrong = {}, {}
  for name in dict.fromkeys(best.values()):
    right[name] = _values(found := judge([forms[name](text) for text in texts], all_records))
    messages += found.messages
    wrong[name] = _values(judge([forms[name](text or '') for text in other], all_records))
  own = {who for who, one in judging.items() if ':' in name_of(unbound(_function(one)))}
  verdicts = [
    _verdict(who, form, rows, right[form][who], empty[who], wrong[form][who])._replace(
      forms=tuple(gains), own=who in own or (who == TOTAL and bool(own))
    )
    for who, form in best.items()
    if who != TOTAL or len(judging) > 1 or len(reward) > 1
  ]
  return Canary(tuple(verdicts), tuple(sorted(notes)), dict(zip(rows, texts)), tuple(messages[:5]))


def _values(scores: Scores) -> dict[str, np.ndarray]:
  return {**scores.components, TOTAL: scores.total}


def _verdict(
  name: str, form: str, rows: Sequence[int], right: np.ndarray, empty: np.ndarray, other: np.ndarray
) -> Verdict:
  """Compares numbers: it accepts what gets more than halfway from wrong texts to right ones."""
  bad = np.concatenate([empty, other])
  failed = np.isnan(right) | np.isnan(empty) | np.isnan(other)
  at = lambda where: tuple(int(row) for row, there in zip(rows, where) if there)
  if np.isnan(right).all() or np.isnan(bad).all():
    return Verdict(name, form, tuple(rows), False, (), (), (), at(failed))
  high, low = np.nanquantile(right, 0.9), np.nanquantile(bad, 0.1)
  if high <= low:
    high, low = np.nanmax(right), np.nanmin(bad)
  if high <= low or not (right[:, None] > np.stack([empty, other], 1)).any():
    return Verdict(name, form, tuple(rows), False, (), (), (), at(failed))
  middle = (high + low) / 2
  return Verdict(
    name, form, tuple(rows), True,
    at(right < middle), at(empty > middle), at(other > middle), at(failed),
  )  # fmt: skip


def findings(path: str, canary: Canary, place: Callable[[int], str]) -> list[Finding]:
  """What the verdicts say is wrong with the reward of a section; `place` names a row."""
  wrong = []
  for v in canary.verdicts:
    where = f'{path}.reward' if v.name == TOTAL else f'{path}.reward.{v.name}'
    decides = v.name == TOTAL or len(canary.verdicts) == 1
    count = f'{len(v.rows)} records'
    if len(v.errors) == len(v.rows):
      reason = f' ({canary.messages[0]})' if canary.messages else ''
      mend = 'a wrong completion should get a low number, not an error'
      wrong.append(Finding(where, f'it fails on all of {count}{reason}', mend, fails=True))
    elif not v.tells_apart:
      text = f'right answers get no more than wrong ones on {count}, as {", as ".join(v.forms)}'
      mend = 'if it asks for another form, all is well; otherwise look at the fields that it reads'
      wrong.append(Finding(where, text, mend, fails=decides and not v.own))
    else:
      if v.form != BARE and decides:
        mend = 'the prompt or the system turn should ask for this form'
        wrong.append(Finding(where, f'it refuses {BARE}, but accepts {v.form}', mend))
      wrong += [] if v.name == TOTAL else _of_rows(where, v, canary, place, decides)
  return wrong


def unanswered(
  path: str,
  reward: Mapping[str, Any],
  judge: Callable[[Sequence[str], Sequence[Mapping]], Scores],
  records: Sequence[tuple[int, Mapping]],
  place: Callable[[int], str],
) -> list[Finding]:
  """Verifiers that fail on records without an answer; the arguments are those of `try_verifiers`."""
  field = field_of(reward)
  bare = [(row, record) for row, record in records if record.get(field) is None]
  if not bare or not reward:
    return []
  scores, wrong = judge([''] * len(bare), [record for _, record in bare]), []
  for name, values in scores.components.items():
    if rows := [row for (row, _), value in zip(bare, values) if np.isnan(value)]:
      text = f'it fails on {len(rows)} of {len(records)} records, which have no {field!r}'
      text += f' ({some(rows, place)})'
      mend = f'give them one, or say where it is with fields.{field}=COLUMN'
      wrong.append(Finding(f'{path}.reward.{name}', text, mend, fails=len(rows) == len(records)))
  return wrong


def _of_rows(
  where: str, v: Verdict, canary: Canary, place: Callable[[int], str], decides: bool
) -> list[Finding]:
  """Rows that a verifier judges wrongly; it fails if it alone decides and accepts every empty text."""
  wrong = []
  for rows, text in (
    (v.refused, 'it refuses the right answer'),
    (v.accepted_empty, 'it accepts an empty text'),
    (v.accepted_other, 'it accepts the answer of another record'),
    (v.errors, 'it fails, instead of giving a number,'),
  ):
    if rows:
      example = f'{canary.answers[rows[0]]!r:.60}'
      text = (
        f'{text} on {len(rows)} of {len(v.rows)} records ({some(rows, place)}; answer {example})'
      )
      always = rows == v.accepted_empty == v.rows
      wrong.append(Finding(where, text, fails=always and decides))
  return wrong
