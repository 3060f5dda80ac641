"""GGUF files of Hugging Face folders, as llama.cpp's converter writes them. Shares no code with what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

NORMAL, CONTROL = 1, 3
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(
    folder: Path,
    path: Path,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    pre: str = "gpt-2",
    add_bos: bool | None = True,
    special: bool = True,
    without: tuple[str, ...] = (),
    facts: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a model of Llama's shape with its byte-level tokenizer.

    Args:
        folder: config, weights and tokenizer.json.
        path: the file to write.
        kind: of the matrices' numbers; vectors are float32 always.
        architecture, pre, add_bos: what the file says of itself; nothing of BOS where that is None.
        special: whether the file names its BOS and EOS.
        without: tensors to leave out, by their names in the file.
        facts: further metadata.
        extra: further tensors.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, folder, pre, add_bos, special)
    for name, value in (facts or {}).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](name, value)
    arrays = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2], 0)
        if heads:  # llama.cpp turns neighbouring pairs, transformers the halves of a head
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        arrays[_name(name)] = tensor.contiguous().numpy()
    for name, array in {**arrays, **(extra or {})}.items():
        if name in without:
            continue
        if array.ndim < 2 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, array.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _name(name: str) -> str:
    names = {"model.embed_tokens.": "token_embd.", "model.norm.": "output_norm.", "lm_head.": "output."}
    for theirs, here in names.items():
        if name.startswith(theirs):
            return here + name.rpartition(".")[2]
    _, _, layer, rest = name.split(".", 3)
    part, _, leaf = rest.rpartition(".")
    return f"blk.{layer}.{_NAMES[part]}.{leaf}"


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, pre: str, add_bos: bool | None, named: bool) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(fast.convert_ids_to_tokens(range(len(fast))))
    writer.add_token_types([CONTROL if number in special else NORMAL for number in range(len(fast))])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    if named:
        writer.add_bos_token_id(fast.bos_token_id)
        writer.add_eos_token_id(fast.eos_token_id)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
