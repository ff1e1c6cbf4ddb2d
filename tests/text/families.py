"""Chat templates that behave as the common families do, and a small byte-level BPE; written for the tests."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from empg_jax.text import Tokenizer

# Qwen2.5's manner: a default system message, tools told in it, a newline after every end of turn; answers of
# tools that follow each other share one turn of the user.
CHATML = """
{%- set first = messages[0]['content'] if messages[0]['role'] == 'system' else 'Be helpful.' %}
{{- '<|im_start|>system\n' + first }}
{%- if tools %}
    {{- '\n\n# Tools\n' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{% endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for message in messages %}
    {%- if message['role'] == 'tool' %}
        {%- if messages[loop.index0 - 1]['role'] != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' + message['content'] + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
    {%- elif message['role'] == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message['content'] %}{{- '\n' + message['content'] }}{% endif %}
        {%- for call in message.tool_calls %}
            {{- '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message['role'] != 'system' or not loop.first %}
        {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""

# Qwen3's manner: reasoning is kept only in answers after the last question of a person, and the last answer
# of all has a thought even when it is empty.
THINKING = """
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' and not message.content.startswith('<tool_response>') %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if keep_thinking and reasoning or loop.index0 > ns.last and (loop.last or reasoning) %}
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

# Llama 3's manner: a begin-of-text token, headers, a system turn of its own that tells a date, trimmed
# contents, no newline between turns.
HEADERS = """
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n' }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim }}{% endif %}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message['role'] != 'system' or not loop.first %}
        {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
        {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""

# Mistral's manner: roles must alternate, no system role, no generation prompt, eos ends an answer.
BRACKETS = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ('user', 'assistant') %}
        {{- raise_exception('only user and assistant roles are supported, not ' + message['role']) }}
    {%- elif (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}{{- '[INST]' + message['content'] + '[/INST]' }}
    {%- else %}{{- message['content'] + eos_token }}{% endif %}
{%- endfor %}
"""

# Mistral's other manner: a space stands before a trimmed answer, which a sampler must say itself.
SPACED = BRACKETS.replace("message['content'] + eos_token", "' ' + message['content'] | trim + eos_token")

# gpt-oss's manner: an answer names its channel, which a generation prompt leaves open; an answer that is over
# for good ends by another token than one in history.
CHANNELS = """
{%- for message in messages %}
    {{- '<|start|>' + message.role }}
    {%- if message.role == 'assistant' %}{{- '<|channel|>final' }}{% endif %}
    {{- '<|message|>' + message.content }}
    {{- '<|return|>' if message.role == 'assistant' and loop.last else '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}
"""

TEMPLATES = {
    "chatml": CHATML,
    "thinking": THINKING,
    "headers": HEADERS,
    "brackets": BRACKETS,
    "spaced": SPACED,
}
ALTERNATING = ("brackets", "spaced")  # only user and assistant, by turns
_SPECIALS = {
    "channels": ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"],
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
    "spaced": ["<s>", "</s>", "[INST]", "[/INST]"],
}
_NAMED = {
    "channels": {"eos_token": "<|return|>"},
    "chatml": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "thinking": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "headers": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "brackets": {"bos_token": "<s>", "eos_token": "</s>"},
    "spaced": {"bos_token": "<s>", "eos_token": "</s>"},
}
_LINES = (
    "You are in the middle of a room. Looking quickly around you, you see a fridge 1, a shelf 2.",
    "system user assistant\nBe helpful.\n\nYour task is to: put a clean apple in the fridge.",
    "go to fridge 1\nopen fridge 1\ntake apple 1 from shelf 2\nNothing happens.",
    "<think>\nI should look for the apple first.\n</think>\n\n<action>go to shelf 2</action>",
)


def build_bpe(family: str, template: str | None = None, *, marks_beginning: bool = False) -> Tokenizer:
    """A small BPE trained on a few lines, with the control tokens and the template of a family.

    It works on bytes, or, in the manner of SentencePiece, marks words and the beginning of a text.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    if marks_beginning:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
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
