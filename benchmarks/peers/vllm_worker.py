"""The vLLM worker of the comparison: rollouts of one model in one process, timed one by one.

Run as `python benchmarks/peers/vllm_worker.py WORK rollout`, after polgrad's worker, whose lengths of
completions are those of each request here (`max_tokens`). vLLM compiles the model and has no seeds. Its
threads are not bound to cores, and wait without spinning, because other work may share the cores: then
CPU seconds say more than seconds. It gives the log-prob of each token, under the distribution
that the token was drawn from, as polgrad does.
"""

import contextlib
import json
import os
import pathlib
import resource
import sys
import time

os.environ['VLLM_ENABLE_V1_MULTIPROCESSING'] = '0'
os.environ.setdefault('VLLM_CPU_KVCACHE_SPACE', '4')
os.environ |= {'VLLM_CPU_OMP_THREADS_BIND': 'nobind', 'OMP_WAIT_POLICY': 'passive'}
os.environ.setdefault('OMP_NUM_THREADS', str(min(2, os.cpu_count())))
os.environ.setdefault('VLLM_NO_USAGE_STATS', '1')

import vllm


def run(work):
  load, data = (json.loads((work / name).read_text()) for name in ('workload.json', 'data.json'))
  lengths = json.loads((work / 'lengths.json').read_text())
  begin = time.perf_counter()
  llm = vllm.LLM(
    model=str(work / 'model'),
    skip_tokenizer_init=True,
    logprobs_mode='processed_logprobs',
    dtype=load['dtype'],
    max_model_len=data['prompt_length'] + load['new_tokens'],
    max_num_seqs=load['at_once'] or len(lengths),
    enable_prefix_caching=False,  # a rollout of a run begins with new prompts and new weights
  )
  prompts = [{'prompt_token_ids': ids} for ids in data['prompts'] for _ in range(load['samples'])]
  common = dict(temperature=1.0, logprobs=0, detokenize=False, ignore_eos=True)
  wanted = [vllm.SamplingParams(max_tokens=n, **common) for n in lengths]
  spent, cpu = [], []
  for _ in range(load['steps']):
    start, before = time.perf_counter(), time.process_time()
    done = llm.generate(prompts, wanted, use_tqdm=False)
    spent.append(time.perf_counter() - start)
    cpu.append(time.process_time() - before)
  drawn = [one.outputs[0].token_ids for one in done]
  assert [len(ids) for ids in drawn] == lengths
  # The first one includes loading and compiling.
  first = spent[0] + (time.perf_counter() - begin - sum(spent))
  return {
    'framework': 'vllm',
    'version': vllm.__version__,
    'kind': 'rollout',
    'first': {'rollout': first},
    'seconds': {'rollout': spent[1:], 'cpu': cpu[1:]},
    'tokens': sum(lengths),
    'peak_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
  }


if __name__ == '__main__':
  with contextlib.redirect_stdout(sys.stderr):
    record = run(pathlib.Path(sys.argv[1]))
  print(json.dumps(record))
