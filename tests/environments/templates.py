"""Small chat templates in the ways of model families, all for the vocabulary of `folders.chatml`."""

# As Qwen 3: thoughts of earlier turns are dropped, and results of tools are a user turn, joined.
QWEN3 = """
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}
  {%- if m.role == 'user' and not m.content.startswith('<tool_response>') -%}
    {%- set ns.last = loop.index0 -%}
  {%- endif -%}
{%- endfor -%}
{%- if tools -%}
  {{- '<|im_start|>system\n# Tools\n' -}}
  {%- for t in tools -%}{{- t | tojson + '\n' -}}{%- endfor -%}{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'tool' -%}
    {%- if loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
  {%- elif m.role == 'assistant' -%}
    {%- set words = m.content.split('</think>')[-1].lstrip('\n') -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > ns.last -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
    {{- words + '<|im_end|>\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
# As Hermes: results of tools have a role, and are joined.
HERMES = """
{%- if tools -%}
  {{- '<|im_start|>system\n<tools>' -}}
  {%- for t in tools -%}{{- t | tojson -}}{%- endfor -%}{{- '</tools><|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'tool' -%}
    {%- if loop.previtem.role != 'tool' -%}{{- '<|im_start|>tool' -}}{%- endif -%}
    {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
  {%- else -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
# As Llama 3.1: the tools are in the first user turn, and a result of a tool is JSON.
LLAMA31 = """
{%- for m in messages -%}
  {%- if m.role in ('tool', 'ipython') -%}
    {{- '<|im_start|>ipython<|im_start|>\n\n' + m.content | tojson + '<|im_end|>' -}}
  {%- else -%}
    {{- '<|im_start|>' + m.role + '<|im_start|>\n\n' -}}
    {%- if tools and loop.first -%}{{- 'Functions: ' + tools | tojson + '\n\n' -}}{%- endif -%}
    {{- m.content | trim + '<|im_end|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_start|>\n\n' -}}{%- endif -%}
"""
# As Mistral: turns alternate, results of tools have an id of nine characters, nothing opens a turn.
MISTRAL = """
{%- set ns = namespace(index=0) -%}
{%- for m in messages -%}
  {%- if m.role in ('user', 'assistant') -%}
    {%- if (m.role == 'user') != (ns.index % 2 == 0) -%}
      {{- raise_exception('roles must alternate user/assistant/...') -}}
    {%- endif -%}
    {%- set ns.index = ns.index + 1 -%}
  {%- endif -%}
  {%- if m.role == 'user' -%}
    {%- if tools and loop.last -%}{{- '[AVAILABLE_TOOLS]' + tools | tojson -}}{%- endif -%}
    {{- '[INST] ' + m.content + '[/INST]' -}}
  {%- elif m.role == 'tool' -%}
    {%- if m.tool_call_id | length != 9 -%}{{- raise_exception('an id has 9 characters') -}}{%- endif -%}
    {{- '[TOOL_RESULTS] ' + m.content + m.tool_call_id + '[/TOOL_RESULTS]' -}}
  {%- elif m.role == 'assistant' -%}
    {{- ' ' + m.content + '<|im_end|>' -}}
  {%- else -%}
    {{- raise_exception('only user, assistant and tool') -}}
  {%- endif -%}
{%- endfor -%}
"""
# Keeps nothing of a turn but the last.
FORGETFUL = (
  "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}"
  "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEAF = (  # writes nothing of a tool
  "{% for m in messages %}{% if m.role != 'tool' %}"
  "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
  "{% endfor %}{{ tools | length if tools else '' }}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As models that always think: the generation prompt begins a thought.
THINKING = HERMES.replace("assistant\n' -}}{%- endif -%}", "assistant\n<think>\n' -}}{%- endif -%}")
