"""Where dictionaries of other packages come from: their names of models and places in the names of TransformerLens.

What is not certain is left out; ``saekit eval`` then asks for ``--model`` and ``--hook``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"(?:layers|h)\.(\d{1,4})(\.mlp)?")
_NORM_AFTER_MLP = re.compile(r"(?i)gemma-?[234]|olmo-?[23]|glm")  # there an MLP module's output is not hook_mlp_out
_GEMMA_SCOPE = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|att|mlp)\b")
_GEMMA_HOOKS = {"res": "hook_resid_post", "att": "attn.hook_z", "mlp": "hook_mlp_out"}
_OPENAI = re.compile(
    r"gpt2-small/(mlp_post_act|resid_delta_attn|resid_post_attn|resid_delta_mlp|resid_post_mlp)"
    r"(?:_v4|_v5_32k|_v5_128k)?/autoencoders/(\d{1,2})\.pt$"
)
_OPENAI_HOOKS = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}


def known(**facts: Any) -> dict[str, Any]:
    """Metadata without what is unknown or of the wrong kind; texts and whole numbers alone are kept."""
    return {name: value for name, value in facts.items() if (isinstance(value, str) and value) or type(value) is int}


def of_dictionary_learning(trainer: Mapping[str, Any], buffer: Any) -> dict[str, Any]:
    """From the config of a trainer and of its buffer of activations."""
    named = re.fullmatch(r"resid_post_layer_(\d{1,4})", str(trainer.get("submodule_name")))
    layer = int(named[1]) if named else None
    hook = f"blocks.{layer}.hook_resid_post" if layer is not None and layer == trainer.get("layer") else None
    context = buffer.get("ctx_len") if isinstance(buffer, dict) else None
    return known(model_name=trainer.get("lm_name"), hook_name=hook, context_size=_length(context))


def for_dictionary_learning(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same in the words of a trainer's config."""
    found = re.fullmatch(r"blocks\.(\d{1,4})\.hook_resid_post", str(facts.get("hook_name")))
    where = {"layer": int(found[1]), "submodule_name": f"resid_post_layer_{int(found[1])}"} if found else {}
    return {"lm_name": facts.get("model_name"), **where}


def of_sparsify(folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """From the name of a hook point's folder (relative to the base model) and the run's config beside it."""
    model = run.get("model")
    found = _BLOCK.fullmatch(folder.name)
    hook = f"blocks.{int(found[1])}.hook_resid_post" if found and not found[2] else None
    if found and found[2] and isinstance(model, str) and not _NORM_AFTER_MLP.search(model):
        hook = f"blocks.{int(found[1])}.hook_mlp_out"
    return known(
        model_name=model,
        hook_name=hook,
        dataset_path=run.get("dataset"),
        context_size=_length(run.get("ctx_len")),
    )


def of_gemma_scope(folder: Path) -> dict[str, Any]:
    """From a path as the repositories of Gemma Scope 1 have it, in the cache of the hub too."""
    path = folder.resolve().as_posix()
    found, layer = _GEMMA_SCOPE.search(path), re.search(r"/layer_(\d{1,3})/width_\w+/", path + "/")
    if not found or not layer:
        return {}
    size, kind, place = found.groups()
    model = f"google/gemma-2-{size}" + ("-it" if kind == "it" else "")
    return known(model_name=model, hook_name=f"blocks.{int(layer[1])}.{_GEMMA_HOOKS[place]}", context_size=1024)


def of_openai(path: Path) -> dict[str, Any]:
    """From a path as OpenAI published its dictionaries of GPT-2 small."""
    found = _OPENAI.search((path.parent.resolve() / path.name).as_posix())  # the file may be a link of the hub's cache
    if not found:
        return {}
    return known(model_name="gpt2", hook_name=f"blocks.{int(found[2])}.{_OPENAI_HOOKS[found[1]]}")


def _length(value: Any) -> int | None:
    """A context's length, where it can be one."""
    return value if type(value) is int and 0 < value < 2**31 else None
