"""Models of a few thousand random weights in which rows mix by the length of their batch, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_lm


def save_fnet(folder: Path, tokenizer: Path) -> Path:
    """An FNet, whose Fourier transform goes over padding too: it knows no attention mask.

    Args:
        tokenizer: the tiny BERT's folder.
    """
    import torch
    from transformers import AutoTokenizer, FNetConfig, FNetForSequenceClassification

    words = AutoTokenizer.from_pretrained(tokenizer)
    config = FNetConfig(
        vocab_size=words.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        max_position_embeddings=64,
        num_labels=3,
        pad_token_id=words.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FNetForSequenceClassification(config)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_longrope(folder: Path, switches_at: int) -> Path:
    """A Phi-3 whose rotary embedding is another one for batches of more than `switches_at` tokens."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    half = 32 // 4 // 2
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [1.2] * half,
        "original_max_position_embeddings": switches_at,
    }
    config = Phi3Config(
        vocab_size=tiny_lm.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=switches_at,
        rope_parameters=scaling,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Phi3ForCausalLM(config)
    model.save_pretrained(folder)
    tiny_lm.tokenizer().save_pretrained(folder)
    return folder
