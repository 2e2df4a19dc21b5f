"""The process of an external engine: it samples with vLLM, and imports neither JAX nor polgrad.

    PYTHON vllm_worker.py FD LIFELINE FOLDER

The Python is that of vLLM's environment. Messages go over the socket FD, each as its length in bytes
(u64, little endian) and one JSON object. Every request gets one reply, in order:

    {"do": "start", "folder": F, "settings": {...}}        loads the model of F
    -> {"engine": "vllm 0.32.0"}
    {"do": "weights", "folder": F}                         takes the tensors of F/model.safetensors
    -> {"tensors": 272}
    {"do": "sample", "prompts": [[ids]], "seeds": [[of each sample]], "settings": {...}}
    -> {"rows": [{"tokens": [ids], "logp": [nats]}]}       prompt-major

What fails is answered with `{"error": "KIND: why"}`. The process ends when the socket closes. As
soon as the pipe LIFELINE does, because the trainer was killed, it removes the FOLDER of the weights and
kills itself with all that it started.
Another engine has the same three methods as `Vllm`, and calls `serve`.
"""

import json
import os
import shutil
import signal
import socket
import sys
import threading


class Vllm:
  """vLLM in this process."""

  def __init__(self):
    self.llm = None

  def start(self, folder, settings):
    """Loads the model of a folder.

    Args:
      folder: config.json and model.safetensors.
      settings: of `vllm.LLM`.
    """
    # One process: it has the model itself, and nothing is left when it is killed.
    os.environ['VLLM_ENABLE_V1_MULTIPROCESSING'] = '0'
    import vllm

    self.llm = vllm.LLM(
      model=folder,
      # Ids alone: texts are the trainer's.
      skip_tokenizer_init=True,
      # Log-probs of the distribution that tokens are drawn from.
      logprobs_mode='processed_logprobs',
      **settings,
    )
    return {'engine': f'vllm {vllm.__version__}'}

  def weights(self, folder):
    """Puts the tensors of a folder into the places of those that the model has."""
    from safetensors import safe_open

    self.llm.collective_rpc('reload_weights', kwargs={'weights_path': folder})
    self.llm.apply_model(_prepare_heads)
    self.llm.reset_prefix_cache()  # its keys and values are those of the weights before
    with safe_open(os.path.join(folder, 'model.safetensors'), 'pt') as file:
      return {'tensors': len(file.keys())}

  def sample(self, prompts, seeds, settings):
    """Completions of prompts, one for each seed."""
    import vllm

    rows = [(ids, seed) for ids, own in zip(prompts, seeds, strict=True) for seed in own]
    # Stop tokens are those of the run alone, and the one that was drawn is part of the completion.
    common = dict(logprobs=0, detokenize=False, ignore_eos=True)
    done = self.llm.generate(
      [{'prompt_token_ids': ids} for ids, _ in rows],
      [vllm.SamplingParams(seed=seed, **common, **settings) for _, seed in rows],
      use_tqdm=False,
    )
    return {'rows': [self._row(one.outputs[0]) for one in done]}

  def _row(self, drawn):
    ids = [int(i) for i in drawn.token_ids]
    return {'tokens': ids, 'logp': [x[i].logprob for x, i in zip(drawn.logprobs, ids, strict=True)]}


def _prepare_heads(model):
  """Lets the heads of a model take their weights again.

  A head that shares its weights with the embedding has no tensor in the file, so `reload_weights` leaves
  alone what was made of the earlier ones: on CPUs, a copy in the layout of its products.
  """
  from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

  for module in model.modules():
    if isinstance(module, ParallelLMHead):
      module.quant_method.process_weights_after_loading(module)


def serve(engine, fd, lifeline, folder):
  """Answers requests until the socket closes.

  Args:
    engine: has `start`, `weights` and `sample`, whose arguments are those of the requests.
    fd: the socket.
    lifeline: the pipe that closes when the trainer ends.
    folder: of the weights.
  """
  threading.Thread(target=_end_with, args=(lifeline, folder), daemon=True).start()
  with socket.socket(fileno=fd) as link, link.makefile('rb') as requests:
    while head := requests.read(8):
      asked = json.loads(requests.read(int.from_bytes(head, 'little')))
      try:
        answer = getattr(engine, asked.pop('do'))(**asked)
      except Exception as error:  # whatever an engine raises
        answer = {'error': f'{type(error).__name__}: {str(error)[:2000]}'}
      text = json.dumps(answer).encode()
      link.sendall(len(text).to_bytes(8, 'little') + text)


def _end_with(lifeline, folder):
  """Waits for the end of the trainer, removes the folder and kills the group of this process."""
  os.read(lifeline, 1)
  shutil.rmtree(folder, ignore_errors=True)
  os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == '__main__':
  serve(Vllm(), int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
