"""Causal language models of a few thousand random weights, with a tokenizer of bytes, as files on disk."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from quorate.shared.config.run_config import RunConfig
from quorate.shared.tasks.task import Row

VOCABULARY = 272
"""More than the tokenizer's 260: some architectures' own tokenizer class adds tokens."""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(chat_template: str | None = None) -> Any:
    """One token per byte, with begin and end of text; none to pad with."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "<|im_start|>": 2, "<|im_end|>": 3}
    vocabulary |= {letter: 4 + at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=128,
    )
    wrapped.chat_template = chat_template
    return wrapped


def config_of(kind: str) -> Any:
    import transformers

    common: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
    decoder = common | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
        return transformers.GPT2Config(**common, **sizes)  # type: ignore[arg-type]
    if kind == "opt":
        sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        more: dict[str, Any] = {"max_position_embeddings": 128, "word_embed_proj_dim": 32, "pad_token_id": 1}
        return transformers.OPTConfig(**common, **sizes, **more)
    if kind == "mistral":
        return transformers.MistralConfig(**decoder, head_dim=8)
    return {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind](**decoder)


def save(folder: Path, kind: str, chat_template: str | None = None) -> Path:
    """Write a model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(kind))
        with torch.no_grad():  # so that attention and positions matter
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    tokenizer(chat_template).save_pretrained(folder)
    return folder


def lm_run(folder: Path, **sections: Any) -> RunConfig:
    """A run of the causal_lm task over a tiny model."""
    base: dict[str, Any] = {
        "name": "test",
        "seed": 3,
        "task": {"name": "causal_lm", "max_length": 48, "max_new_tokens": 8},
        "data": "questions",
        "model": {"model_name_or_path": str(folder)},
        "adapter": {"r": 4, "lora_alpha": 8},
        "training": {"max_steps": 3, "per_device_train_batch_size": 3, "learning_rate": 1e-2},
        "federation": {"rounds": 2, "grace_seconds": 0},
        "evaluation": {"bootstrap_samples": 20},
    }
    for name, section in sections.items():
        base[name] = {**base[name], **section} if isinstance(base.get(name), dict) else section
    return RunConfig.model_validate(base)


def lm_rows(count: int, seed: int) -> list[Row]:
    """Short questions whose answer repeats a word of theirs; of unequal lengths."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        word = draw.choice(["fever", "rash", "cough", "gout"])
        values = {
            "prompt": "what is " * draw.randint(0, 1) + word + "?",
            "completion": word * draw.randint(1, 2),
        }
        rows.append(Row(values, f"rows-{seed}.jsonl:{index + 1}"))
    return rows
