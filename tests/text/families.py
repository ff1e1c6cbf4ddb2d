"""Chat templates that behave as the common families do, and a small byte-level BPE; written for the tests."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from empg_jax.text import Tokenizer

# Qwen2.5's manner: a default system message, and a newline after every end of turn.
CHATML = """
{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""

# Qwen3's manner: reasoning is kept only in answers after the last question of a person.
THINKING = """
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\n' }}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- if loop.index0 > ns.last or keep_thinking %}
            {{- '<think>\n' + reasoning + '\n</think>\n\n' }}
        {%- endif %}
    {%- elif message.role == 'tool' %}
        {%- set content = '<tool_response>\n' + content + '\n</tool_response>' %}
    {%- endif %}
    {{- content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}
"""

# Llama 3's manner: a begin-of-text token, headers, trimmed contents, no newline between turns.
HEADERS = """
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""

# Mistral's manner: roles must alternate, no system role, no generation prompt, eos ends an answer.
BRACKETS = """
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}{{- '[INST]' + message['content'] + '[/INST]' }}
    {%- else %}{{- message['content'] + eos_token }}{% endif %}
{%- endfor %}
"""

TEMPLATES = {"chatml": CHATML, "thinking": THINKING, "headers": HEADERS, "brackets": BRACKETS}
_SPECIALS = {
    "chatml": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "thinking": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "headers": [
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|end_of_text|>",
    ],
    "brackets": ["<s>", "</s>", "[INST]", "[/INST]"],
}
_NAMED = {
    "chatml": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "thinking": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "headers": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "brackets": {"bos_token": "<s>", "eos_token": "</s>"},
}
_LINES = (
    "You are in the middle of a room. Looking quickly around you, you see a fridge 1, a shelf 2.",
    "system user assistant\nBe helpful.\n\nYour task is to: put a clean apple in the fridge.",
    "go to fridge 1\nopen fridge 1\ntake apple 1 from shelf 2\nNothing happens.",
    "<think>\nI should look for the apple first.\n</think>\n\n<action>go to shelf 2</action>",
)


def build_bpe(family: str, template: str | None = None) -> Tokenizer:
    """A byte-level BPE trained on a few lines, with the control tokens and the template of a family."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=_SPECIALS[family],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_LINES, trainer)
    backend.add_tokens(["<think>", "</think>"])  # ordinary added tokens, as in Qwen3: they survive decoding
    return Tokenizer(backend, chat_template=template or TEMPLATES[family], special_tokens=_NAMED[family])
