"""Models in GGUF files, as llama.cpp uses them: read by transformers, checked to be whole, hooked like any other.

Nothing in such a file runs, and nothing beside it is looked at. transformers leaves out in silence what it does not
know of a file: biases, scaled positions, ways to split text. The model would be another one than in llama.cpp, so what
is left out is put right here, or the file is refused.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from saekit.activations.gguf_header import Header, read_header
from saekit.errors import SaekitError, SaekitWarning, first_line
from saekit.special_tokens import special_tokens

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# how llama.cpp (src/llama-vocab.cpp) splits text before it looks for byte pairs, by ``tokenizer.ggml.pre``
_AS_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "roberta-bpe"}
_DIGITS_FIRST = {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"}
# these take a word that is in the vocabulary whole, and begin with BOS where the file does not say
_AS_LLAMA3 = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"}
_BOS_FIRST = {*_AS_LLAMA3, "tekken", "chameleon"}
_FREQUENCIES = "rope_freqs.weight"


def load_gguf(path: str, *, device: str | None, dtype: torch.dtype) -> TransformerBridge:
    """The model of a GGUF file, its weights dequantised to ``dtype``, hooked by TransformerLens.

    Its tokenizer is the file's, and so is the answer to whether contexts begin with BOS.

    Raises:
        SaekitError: the package gguf is missing, the file is damaged, cut off or one part of several, transformers does
            not know its architecture or its quantisation, or would make another model of it.
    """
    header = read_header(Path(path))
    if (parts := header.number("split.count", 1)) > 1:
        raise SaekitError(f"'{path}' is one of {parts} parts of a model; join them by llama-gguf-split --merge")
    if header.number(f"{header.architecture}.block_count", 0) > len(header.tensors):
        raise SaekitError(f"'{path}' is damaged: it claims more blocks than it has tensors")
    network, tokenizer = _read(path, header, dtype)

    from transformer_lens.model_bridge import TransformerBridge

    lent = copy.deepcopy(tokenizer)  # TransformerLens gives it tokens that are missing
    lent.init_kwargs["add_bos_token"] = True  # one that says otherwise would be loaded anew, by its name
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)  # what is loaded already is not moved
    model = TransformerBridge.boot_transformers(path, device=device, dtype=dtype, hf_model=network, tokenizer=lent)
    model.special_tokens = special_tokens(tokenizer).within(int(model.cfg.d_vocab))
    model.text_tokenizer = tokenizer
    model.cfg.default_prepend_bos = model.cfg.tokenizer_prepends_bos
    return model


def gguf_of_hub(name: str) -> str:
    """The path of a file on the hub, downloaded where it is not yet.

    Args:
        name: ``owner/repo/FILE.gguf``; the file may be in a folder.

    Raises:
        SaekitError: there is neither a local file nor one on the hub of this name.
    """
    from huggingface_hub import hf_hub_download

    owner, repo, file = name.split("/", 2)
    try:
        return hf_hub_download(f"{owner}/{repo}", file)
    except Exception as error:  # no network, no such file, no leave
        raise SaekitError(
            f"there is no file '{name}' here, nor can '{file}' of '{owner}/{repo}' be had from the hub: "
            f"{first_line(error)}"
        ) from error


def _read(path: str, header: Header, dtype: torch.dtype) -> tuple[Any, Any]:
    """transformers' model and tokenizer."""
    import transformers

    given: dict[str, Any] = {"gguf_file": str(Path(path).resolve()), "trust_remote_code": False}
    weights: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # since 5.20 or so, and may keep the weights packed otherwise
        weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
    pre = header.facts.get("tokenizer.ggml.pre")
    bos = {"add_bos_token": True} if pre in _BOS_FIRST else {}  # what the file says goes before this
    try:
        # from an empty folder: a config or another tokenizer that stands beside the file is not the file's
        with TemporaryDirectory() as empty, _quietly():
            network, told = transformers.AutoModelForCausalLM.from_pretrained(empty, **given, **weights)
            tokenizer = transformers.AutoTokenizer.from_pretrained(empty, **given, **bos)
    except Exception as error:  # files that others made raise many kinds
        raise SaekitError(f"transformers cannot read '{path}': {first_line(error)}") from error
    if told["missing_keys"]:
        raise SaekitError(
            f"'{path}' is not the {type(network).__name__} that transformers takes it for: it lacks "
            + _some(told["missing_keys"])
        )
    _check_all_used(path, header, network)
    _scale_positions(path, header, network)
    _without_others(tokenizer, header.number("tokenizer.ggml.tokens", math.inf))
    _split_text(path, header, tokenizer.backend_tokenizer)
    network.name_or_path = network.config.name_or_path = tokenizer.name_or_path = path
    return network, tokenizer


@contextmanager
def _quietly() -> Iterator[None]:
    """Without a progress bar that cannot be switched off, without compute kernels, which are code of the hub, and with
    the metadata and the names of tensors, which take Python many seconds, read once.
    """
    import gguf

    changes: list[tuple[str, str, Any]] = [
        *(("gguf", name, lru_cache(getattr(gguf, name))) for name in ("GGUFReader", "get_tensor_name_map")),
        ("transformers.modeling_gguf_pytorch_utils", "tqdm", lambda items, **_: items),
        ("transformers.integrations.gguf.kernels", "is_kernels_available", lambda: False),
    ]
    undo = []
    for name, attribute, value in changes:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # an older transformers
        undo.append((module, attribute, getattr(module, attribute)))
        setattr(module, attribute, value)
    try:
        yield
    finally:
        for module, attribute, value in undo:
            setattr(module, attribute, value)


def _check_all_used(path: str, header: Header, network: Any) -> None:
    """Raise SaekitError where the file has weights that the model took no notice of.

    Numbers are counted, since a model may merge tensors of the file or divide them. The blocks that guess further
    tokens, and a second copy of the embedding, are of no use to the model in transformers either.
    """
    layers = int(network.config.num_hidden_layers)
    spare = {_FREQUENCIES, *(["output.weight"] if network.config.tie_word_embeddings else [])}
    if f"{header.architecture}.nextn_predict_layers" in header.facts:
        spare |= {n for n in header.tensors if (block := re.match(r"blk\.(\d+)\.", n)) and int(block[1]) >= layers}
    held = {name: math.prod(stored.shape) for name, stored in header.tensors.items() if name not in spare}
    taken = {tensor.data_ptr(): tensor.numel() for tensor in network.state_dict().values()}
    if sum(held.values()) > sum(taken.values()):
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        kinds = [kind for kind, name in MODEL_ARCH_NAMES.items() if name == header.architecture]
        names = get_tensor_name_map(kinds[0], layers) if kinds else None
        known = {names.get_name(n, try_suffixes=(".weight", ".bias")) for n in network.state_dict()} if names else set()
        raise SaekitError(
            f"'{path}' holds weights that the {type(network).__name__} which transformers takes it for does not have: "
            + _some([name for name in held if name not in known])
        )


def _scale_positions(path: str, header: Header, network: Any) -> None:
    """Divide the rotary frequencies as the file says (Llama 3.1 and later).

    Raises:
        SaekitError: positions are scaled in another way, which transformers does not read from the file.
    """
    prefix = f"{header.architecture}.rope.scal"
    kind = header.facts.get(f"{prefix}ing.type", "none")
    factor = header.facts.get(f"{prefix}ing.factor", header.facts.get(f"{prefix}e_linear", 1.0))
    if factor != 1.0 and header.architecture != "gpt-oss":  # whose scaling transformers reads
        raise SaekitError(f"'{path}' scales its positions ('{kind}', by {factor}), which transformers does not read")
    if (stored := header.tensors.get(_FREQUENCIES)) is None:
        return
    rotary = [module for module in network.modules() if isinstance(getattr(module, "inv_freq", None), torch.Tensor)]
    if not rotary or stored.kind != 0 or any(module.inv_freq.shape != stored.shape for module in rotary):
        raise SaekitError(f"'{path}' divides its rotary frequencies ({_FREQUENCIES}), and the model has none that fit")
    with Path(path).open("rb") as file:
        file.seek(stored.start)
        factors = torch.frombuffer(bytearray(file.read(4 * stored.shape[0])), dtype=torch.float32)
    for module in rotary:
        module.inv_freq.div_(factors)


def _split_text(path: str, header: Header, backend: Any) -> None:
    """Split text before the search for byte pairs as llama.cpp does, where transformers takes GPT-2's way for all."""
    from tokenizers import pre_tokenizers

    pre = header.facts.get("tokenizer.ggml.pre")
    if pre in _AS_LLAMA3:
        backend.model.ignore_merges = True
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return  # no byte pairs, or transformers knows how
    if pre in _DIGITS_FIRST:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif pre not in _AS_GPT2:
        warnings.warn(
            f"'{path}' splits text in a way that transformers does not know ('{pre or 'default'}'): it is split as by "
            "GPT-2, and some tokens may differ from llama.cpp's",
            SaekitWarning,
            stacklevel=2,
        )


def _without_others(tokenizer: Any, n_tokens: float) -> None:
    """Take out the tokens that transformers' classes bring along; the model has no embedding for them."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = state["added_tokens"]
    state["added_tokens"] = [token for token in added if token["id"] < n_tokens]
    if len(state["added_tokens"]) < len(added):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def _some(names: Any) -> str:
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
