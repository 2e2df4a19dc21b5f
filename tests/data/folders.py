"""Small Hugging Face folders in the layouts of model families, trained on a few lines."""

import json

import sentencepiece as spm
import tokenizers as hf

LINES = [
  'Hello hello world, how are you today?',
  'I am well. The answer is 42!',
  'user assistant model system [INST] [/INST] naïve café\n\n',
]
CHATML = (
  '{% for m in messages %}'
  "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
  "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
  "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen 3 does, keeps the thoughts of the last turn only.
THOUGHTS = (
  '{% for m in messages %}{% set words = m.content %}'
  "{% if m.role == 'assistant' and not loop.last %}{% set words = words.split('</think>')[-1] %}"
  "{% elif m.role == 'assistant' and '</think>' not in words %}"
  "{% set words = '<think>\n\n</think>\n\n' + words %}{% endif %}"
  "{{ '<|im_start|>' + m.role + '\n' + words.strip() + '<|im_end|>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
  '{{ bos_token }}{% for m in messages %}'
  "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
  '{% endfor %}{% if add_generation_prompt %}'
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
  "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
  "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA2 = (
  "{% for m in messages %}{% if m.role == 'user' %}"
  "{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
  "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Newlines stay together, whatever follows; the pattern of ByteLevel gives the last one away.
WORDS = r' ?\p{L}+|\p{N}{1,3}|\s*[\r\n]+|\s+(?!\S)|\s+| ?[^\s\p{L}\p{N}]+'


def write(folder, name, **fields):
  (folder / name).write_text(json.dumps(fields))


def chatml(folder, template=CHATML):
  """Byte-level BPE; nothing opens a text, though a bos token is named."""
  special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
  _byte_level(folder, special)
  write(
    folder,
    'tokenizer_config.json',
    tokenizer_class='PreTrainedTokenizerFast',
    bos_token='<|im_start|>',
    eos_token='<|im_end|>',
    pad_token='<|endoftext|>',
    chat_template=template,
  )
  return folder


def llama3(folder):
  """Byte-level BPE with bos before a text; a message ends with another token than a document."""
  special = ['<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>']
  words = hf.pre_tokenizers.Split(hf.Regex(WORDS), 'isolated')
  model = _byte_level(folder, [*special, '<|eot_id|>'], words)
  bos = hf.processors.TemplateProcessing(
    single='<|begin_of_text|> $A', special_tokens=[('<|begin_of_text|>', 0)]
  )
  byte_level = hf.processors.ByteLevel(trim_offsets=True)
  model.post_processor = hf.processors.Sequence([byte_level, bos])
  model.save(str(folder / 'tokenizer.json'))
  write(
    folder,
    'tokenizer_config.json',
    tokenizer_class='PreTrainedTokenizerFast',
    bos_token='<|begin_of_text|>',
    eos_token='<|end_of_text|>',
    chat_template=LLAMA3,
  )
  write(folder, 'generation_config.json', eos_token_id=[1, 4])
  return folder


def gemma(folder):
  """BPE over characters with bytes to fall back on, and bos before a text."""
  model = hf.Tokenizer(hf.models.BPE(byte_fallback=True, fuse_unk=True, unk_token='<unk>'))
  model.normalizer = hf.normalizers.Replace(' ', '▁')
  model.pre_tokenizer = hf.pre_tokenizers.Split(' ', 'merged_with_previous')
  model.decoder = hf.decoders.Sequence(
    [hf.decoders.Replace('▁', ' '), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
  )
  special = ['<pad>', '<eos>', '<bos>', '<unk>', '<start_of_turn>', '<end_of_turn>']
  _train(model, special + [f'<0x{i:02X}>' for i in range(256)])
  # The bytes had to be among the special tokens to get ids; they are ordinary ones.
  saved = json.loads(model.to_str())
  saved['added_tokens'] = [t for t in saved['added_tokens'] if t['content'] in special]
  model = hf.Tokenizer.from_str(json.dumps(saved))
  model.post_processor = hf.processors.TemplateProcessing(
    single='<bos> $A', special_tokens=[('<bos>', 2)]
  )
  model.save(str(folder / 'tokenizer.json'))
  write(
    folder,
    'tokenizer_config.json',
    tokenizer_class='PreTrainedTokenizerFast',
    bos_token='<bos>',
    eos_token='<eos>',
    pad_token='<pad>',
    chat_template=GEMMA,
  )
  write(folder, 'generation_config.json', eos_token_id=[1, 5])
  return folder


def llama2(folder, added=('<|extra|>',), **config):
  """tokenizer.model alone: SentencePiece BPE with bytes, and tokens added behind its vocabulary."""
  (folder / 'lines.txt').write_text('\n'.join(LINES * 5))
  spm.SentencePieceTrainer.train(
    input=str(folder / 'lines.txt'),
    model_prefix=str(folder / 'tokenizer'),
    vocab_size=420,
    hard_vocab_limit=False,
    model_type='bpe',
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    minloglevel=2,
  )
  size = spm.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model')).vocab_size()
  tokens = [(0, '<unk>'), (1, '<s>'), (2, '</s>'), *enumerate(added, start=size)]
  flags = dict(special=True, lstrip=False, rstrip=False, normalized=False, single_word=False)
  named = dict(bos_token='<s>', eos_token='</s>', unk_token='<unk>', chat_template=LLAMA2)
  write(
    folder,
    'tokenizer_config.json',
    tokenizer_class='LlamaTokenizer',
    add_bos_token=True,
    added_tokens_decoder={str(i): {'content': token, **flags} for i, token in tokens},
    **named | config,
  )
  return folder


def _byte_level(folder, special, words=None):
  model = hf.Tokenizer(hf.models.BPE())
  model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  if words:
    as_bytes = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = hf.pre_tokenizers.Sequence([words, as_bytes])
  model.post_processor = hf.processors.ByteLevel(trim_offsets=True)
  model.decoder = hf.decoders.ByteLevel()
  _train(model, special, initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet())
  model.save(str(folder / 'tokenizer.json'))
  return model


def _train(model, special, **settings):
  trainer = hf.trainers.BpeTrainer(
    vocab_size=len(special) + 340, special_tokens=special, show_progress=False, **settings
  )
  model.train_from_iterator(LINES * 3, trainer)
