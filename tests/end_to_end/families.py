"""Tiny models of many families, made by transformers from its own configurations, each with its family's habits."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

VOCABULARY, WIDTH, LAYERS = 200, 32, 2
ROWS = 208  # of the embedding: more than the vocabulary, as in many real models


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model: the class in transformers.
        special: the special tokens of its tokenizers, by role.
        bos: the token that TransformerLens lets its contexts begin with; None for text from the first position on.
        settings: of its configuration.
    """

    model: str
    special: dict[str, str]
    bos: str | None
    settings: dict[str, Any]
    causal: bool = True
    hook: str = "blocks.{}.hook_resid_post"


_ONE = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
_NO_BOS = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
_TWO = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
_BERT = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
_OLD = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2}
_USUAL = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 64}
_NEWER = {**_USUAL, "num_key_value_heads": 1, "max_position_embeddings": 128}
_HEADS = {**_NEWER, "head_dim": 16}
_GEMMA_3 = {**_HEADS, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", _ONE, "<|endoftext|>", {**_OLD, "n_positions": 128}),
    "gpt_neox": Family("GPTNeoXForCausalLM", _ONE, None, {**_USUAL, "max_position_embeddings": 128}),
    "opt": Family(
        "OPTForCausalLM", {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}, "</s>",
        {**_USUAL, "ffn_dim": 64, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 128},
    ),
    "bloom": Family(
        "BloomForCausalLM", {**_TWO, "pad_token": "<pad>"}, None,
        {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 2},
    ),
    "llama": Family("LlamaForCausalLM", _TWO, "<s>", _NEWER),
    "mistral": Family("MistralForCausalLM", _TWO, "<s>", {**_NEWER, "sliding_window": 16}),
    "qwen2": Family("Qwen2ForCausalLM", _NO_BOS, None, _NEWER),
    "qwen3": Family("Qwen3ForCausalLM", _NO_BOS, None, _HEADS),
    "gemma2": Family("Gemma2ForCausalLM", _GEMMA, "<bos>", {**_HEADS, "sliding_window": 16}),
    "gemma3": Family("Gemma3ForCausalLM", _GEMMA, "<bos>", _GEMMA_3),
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
    ),
    "phi": Family("PhiForCausalLM", _ONE, None, {**_USUAL, "max_position_embeddings": 128}),
    "mixtral": Family("MixtralForCausalLM", _TWO, "<s>", {**_NEWER, "num_local_experts": 4}),
    "mamba": Family(
        "MambaForCausalLM", _ONE, "<|endoftext|>", {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 4}
    ),
    "bert": Family("BertForMaskedLM", _BERT, "[CLS]", {**_USUAL, "max_position_embeddings": 128}, causal=False),
    "t5": Family(
        "T5ForConditionalGeneration", {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}, None,
        {"d_model": WIDTH, "num_layers": LAYERS, "num_decoder_layers": LAYERS, "num_heads": 2, "d_kv": 16, "d_ff": 64,
         "decoder_start_token_id": 0},
        causal=False, hook="encoder_blocks.{}.hook_out",
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


def write_tokenizer(folder: Path, special: dict[str, str]) -> Any:
    """Train a tokenizer with these special tokens, and no others, and save it."""
    tokenizer = Tokenizer(models.BPE(unk_token=special.get("unk_token")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(dict.fromkeys(special.values())), show_progress=False
    )
    tokenizer.train_from_iterator(documents(), trainer)
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    saved.save_pretrained(folder)
    return saved


def write_model(folder: Path, family: Family) -> Any:
    """Make a model with random weights, large enough that its layers do something, and save it with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder, family.special)
    kind = getattr(transformers, family.model)
    roles = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    inside = family.settings.get("text_config")
    settings = family.settings | ({"text_config": inside | roles} if inside else roles)
    torch.manual_seed(0)
    model = kind(kind.config_class(vocab_size=ROWS, **settings)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and not name.endswith("A_log"):
                weight.mul_(4)
    model.save_pretrained(folder)
    return model
