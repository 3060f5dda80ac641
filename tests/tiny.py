"""Tiny models with random weights, norms and biases among them, and the embedded model's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

import saekit

EMBEDDED = Path(saekit.__file__).parent / "embedded"
_OLD = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}
_NEW = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
_NEW["max_position_embeddings"] = 64
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", _OLD),
    "gpt_neox": ("GPTNeoXForCausalLM", _NEW),
    "opt": ("OPTForCausalLM", {**_NEW, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "qwen2": ("Qwen2ForCausalLM", {**_NEW, "num_key_value_heads": 1}),
    "bert": ("BertForMaskedLM", _NEW),
}


def write_tiny(folder: Path, kind: str) -> Path:
    """Save one; ``kind`` is a key of ``TINY``."""
    name, settings = TINY[kind]
    made = getattr(transformers, name)
    torch.manual_seed(0)
    model = made(made.config_class(vocab_size=4096, bos_token_id=0, eos_token_id=0, **settings))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn_like(weight)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / file, folder)
    return folder
