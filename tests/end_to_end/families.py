"""Tiny models of many families, made by transformers from its own configurations, each with its family's habits."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY, WIDTH, LAYERS = 200, 32, 2
ROWS = 208  # of the embedding: more than the vocabulary, as in many real models


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model: the class in transformers.
        special: the special tokens of its tokenizers, by role.
        bos: the token that its contexts begin with; None for text from the first position on.
        settings: of its configuration.
        norm: the module that its last hidden states have passed, after the last block; None for none.
        causal: whether it predicts next tokens.
        hook: its residual hook points.
        layers: its modules that are blocks.
        first: which of its hidden states is that of the first block; 0 where it does not give the embedding.
        scale: by how much its weights are larger than transformers makes them, so that its blocks do something.
    """

    model: str
    special: dict[str, str]
    bos: str | None
    settings: dict[str, Any]
    norm: str | None
    layers: str
    causal: bool = True
    hook: str = "blocks.{}.hook_resid_post"
    first: int = 1
    scale: float = 4


_ONE = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
_NO_BOS = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
_TWO = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
_BERT = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
_USUAL = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 64}
_NEWER = {**_USUAL, "num_key_value_heads": 1, "max_position_embeddings": 128}
_HEADS = {**_NEWER, "head_dim": 16}
_GEMMA_3 = {**_HEADS, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}

_BODY = ("model.norm", "model.layers")

FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel", _ONE, "<|endoftext|>", {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 128},
        "transformer.ln_f", "transformer.h",
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", _ONE, None, {**_USUAL, "max_position_embeddings": 128},
        "gpt_neox.final_layer_norm", "gpt_neox.layers",
    ),
    "opt": Family(
        "OPTForCausalLM", {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}, "</s>",
        {**_USUAL, "ffn_dim": 64, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 128},
        "model.decoder.final_layer_norm", "model.decoder.layers",
    ),
    "bloom": Family(
        "BloomForCausalLM", {**_TWO, "pad_token": "<pad>"}, None,
        {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 2}, "transformer.ln_f", "transformer.h",
    ),
    "llama": Family("LlamaForCausalLM", _TWO, "<s>", _NEWER, *_BODY),
    "mistral": Family("MistralForCausalLM", _TWO, "<s>", {**_NEWER, "sliding_window": 16}, *_BODY),
    "qwen2": Family("Qwen2ForCausalLM", _NO_BOS, None, _NEWER, *_BODY),
    "qwen3": Family("Qwen3ForCausalLM", _NO_BOS, None, _HEADS, *_BODY),
    "gemma2": Family("Gemma2ForCausalLM", _GEMMA, "<bos>", {**_HEADS, "sliding_window": 16}, *_BODY),
    "gemma3": Family("Gemma3ForCausalLM", _GEMMA, "<bos>", _GEMMA_3, *_BODY),
    "gemma3_multimodal": Family(
        "Gemma3ForConditionalGeneration", {**_GEMMA, "boi_token": "<start_of_image>"}, "<bos>",
        {
            "text_config": {**_GEMMA_3, "vocab_size": ROWS},
            "vision_config": {
                "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
                "image_size": 16, "patch_size": 4,
            },
            "mm_tokens_per_image": 4, "image_token_index": ROWS - 1, "boi_token_index": ROWS - 2,
            "eoi_token_index": ROWS - 3,
        },
        "model.language_model.norm", "model.language_model.layers",
    ),
    "phi": Family(
        "PhiForCausalLM", _ONE, None, {**_USUAL, "max_position_embeddings": 128},
        "model.final_layernorm", "model.layers",
    ),
    "mixtral": Family("MixtralForCausalLM", _TWO, "<s>", {**_NEWER, "num_local_experts": 4}, *_BODY),
    "mamba": Family(
        "MambaForCausalLM", _ONE, "<|endoftext|>", {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 4},
        "backbone.norm_f", "backbone.layers", first=0, scale=1,
    ),
    "bert": Family(
        "BertForMaskedLM", _BERT, "[CLS]", {**_USUAL, "max_position_embeddings": 128}, None,
        "bert.encoder.layer", causal=False,
    ),
    "t5": Family(
        "T5ForConditionalGeneration", {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}, None,
        {"d_model": WIDTH, "num_layers": LAYERS, "num_decoder_layers": LAYERS, "num_heads": 2, "d_kv": 16, "d_ff": 64,
         "decoder_start_token_id": 0},
        "encoder.final_layer_norm", "encoder.block", causal=False, hook="encoder_blocks.{}.hook_out",
    ),
}  # fmt: skip


def documents(count: int = 240) -> list[str]:
    """Sentences of few words, the same each time."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 7))) for _ in range(60)]
    return [" ".join(draw.choices(words, k=draw.randint(8, 40))) + "." for _ in range(count)]


def write_text(file: Path) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    return file


def write_installers(home: Path) -> dict[str, str]:
    """Stand-ins for what installs, as programs and as modules of Python; the file ``called`` notes what calls them.

    Returns:
        The environment in which they are found first.
    """
    notes = home / "called"
    for name in ("pip", "pip3", "uv", "uvx", "conda"):
        (home / name).write_text(f'#!/bin/sh\necho {name} "$@" >> "{notes}"\nexit 1\n')
        (home / name).chmod(0o755)
    for name in ("pip", "uv", "ensurepip"):
        module = home / "modules" / name
        module.mkdir(parents=True)
        (module / "__init__.py").touch()
        said = f"print({name!r}, *sys.argv[1:], file=open({str(notes)!r}, 'a'))"
        (module / "__main__.py").write_text(f"import sys\n{said}\nsys.exit(1)\n")
    found = {"PATH": str(home), "PYTHONPATH": str(home / "modules")}
    return {key: os.pathsep.join(filter(None, [first, os.environ.get(key)])) for key, first in found.items()}


def write_tokenizer(folder: Path, special: dict[str, str]) -> Any:
    """Train a tokenizer with these special tokens, by their roles, and no others, and save it."""
    tokenizer = Tokenizer(models.BPE(unk_token=special.get("unk_token")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(dict.fromkeys(special.values())), show_progress=False
    )
    tokenizer.train_from_iterator(documents(), trainer)
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    saved.save_pretrained(folder)
    return saved


def write_model(folder: Path, family: Family, rows: int = ROWS) -> Any:
    """Make a model with random weights and so many rows of the embedding, and save it with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder, family.special)
    kind = getattr(transformers, family.model)
    roles = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    inside = family.settings.get("text_config")
    settings = family.settings | ({"text_config": inside | roles} if inside else roles)
    torch.manual_seed(0)
    model = kind(kind.config_class(vocab_size=rows, **settings)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.mul_(family.scale)
    model.save_pretrained(folder)
    return model
