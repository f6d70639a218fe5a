"""Small tokenizers with the special tokens and chat templates of each family, made on the spot."""

from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Fast
from transformers import PreTrainedTokenizerFast

LINES = (
    "The quick brown fox jumps over the lazy dog.",
    "What is 2+2? It is 4. Hello! Be brief.",
    "system user assistant model tool one two three four",
)

# Marker-less templates as a model would bring them, in the plainest form that each family's format allows.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m['reasoning_content'] or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = (
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}"
    "{{ 'Today Date: ' }}"
    "{{ (date_string or strftime_now('%d %b %Y')) + '\n\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% set messages = messages[1:] %}"
    "{% endif %}{{ '<|eot_id|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% set s = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if s is not none and loop.index0 == 1 %}{{ '<<SYS>>\n' + s + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% set s = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set s = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{% if loop.first %}{{ s }}{% endif %}{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ '\n' }}{{ m['content'] }}{{ eos_token }}{{ '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)

SPECIAL = {
    "chatml": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "more": ("<|im_start|>",)},
    "llama3": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "more": ("<|start_header_id|>", "<|end_header_id|>"),
    },
    "llama2": {"bos_token": "<s>", "eos_token": "</s>", "more": ()},
    "zephyr": {"bos_token": "<s>", "eos_token": "</s>", "more": ()},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "more": ("<start_of_turn>", "<end_of_turn>")},
}
OWN = {
    "chatml": ("chatml", CHATML),
    "chatml_system": ("chatml", CHATML_SYSTEM),
    "qwen3": ("chatml", QWEN3),
    "llama3": ("llama3", LLAMA3),
    "llama31": ("llama3", LLAMA31),
    "llama2": ("llama2", LLAMA2),
    "gemma": ("gemma", GEMMA),
    "zephyr": ("zephyr", ZEPHYR),
}


def fast_tokenizer(special: str = "chatml", template: str | None = None, *, metaspace: bool = False):
    """A transformers tokenizer: byte-level BPE, or Llama 2's kind that writes spaces as ▁."""
    named = dict(SPECIAL[special])
    tokens = [*named.pop("more"), *named.values()]
    core = Fast(models.BPE(unk_token=None))
    if metaspace:
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet = sorted({c for line in LINES for c in line} | set("▁[]/<>IN ST\n"))
    else:
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(LINES, trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    hf = PreTrainedTokenizerFast(tokenizer_object=core, **named)
    hf.chat_template = template
    return hf


def save_tokenizer(folder: Path, name: str = "chatml") -> Path:
    """A folder with the tokenizer and own template of OWN[name]."""
    special, template = OWN[name]
    fast_tokenizer(special, template).save_pretrained(folder)
    return folder
