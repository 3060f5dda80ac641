"""What a dictionary's metadata tell of its training that decides what it is judged on: honoured, refused or warned of.

The words are those of SAELens (6.x). What a fact does not name is as SAELens leaves it: the weights unprocessed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from saekit.activations.placement import DTYPES
from saekit.activations.rules import OWN, TextRules
from saekit.errors import SaekitError, SaekitWarning
from saekit.processing import KWARGS, OPTIONS, asked_for

# what changes nothing that the model computes: where it runs, how it is fetched, and BOS, which is told elsewhere
_ELSEWHERE = {
    *("device", "n_devices", "device_map", "move_to_device", "low_cpu_mem_usage", "attn_implementation"),
    *("cache_dir", "token", "use_auth_token", "local_files_only", "force_download", "trust_remote_code"),
    *("default_prepend_bos", "default_padding_side"),
}
_DTYPE = ("dtype", "torch_dtype")


class ModelWanted(NamedTuple):
    """The model that a dictionary was trained on, beyond its name.

    Attributes:
        processing: of its weights.
        revision: on the hub, if it names one.
        dtype: in which it ran, if it says so.
    """

    processing: tuple[str, ...] = ()
    revision: str | None = None
    dtype: str | None = None


def model_wanted(facts: Mapping[str, Any], path: str, hook: str, *, named: bool, dtype: str | None) -> ModelWanted:
    """The model that a dictionary's metadata ask for.

    Args:
        facts: the metadata.
        path: what the user calls the dictionary.
        hook: where it is judged.
        named: whether the user names the model: then its weights are those of the user's.
        dtype: the user's own, which wins.

    Raises:
        SaekitError: the metadata ask for what cannot be honoured.
    """
    kwargs = dict(facts.get(KWARGS) or {})
    for option in OPTIONS:
        if not isinstance(kwargs.get(option), bool | None):
            raise SaekitError(f"the dictionary's metadata: {KWARGS}.{option} is neither true nor false")
    kind = next((str(kwargs[name]).removeprefix("torch.") for name in _DTYPE if kwargs.get(name) is not None), None)
    if kind == "auto":
        kind = None
    if dtype is None and kind is not None and kind not in DTYPES:
        raise SaekitError(f"'{path}' asks for its model in {kind}, which saekit does not run; choose by --model-dtype")
    revision = kwargs.get("revision")
    known = {*OPTIONS, *_ELSEWHERE, *_DTYPE, "revision"}
    others = [name for name, value in kwargs.items() if name not in known and value not in (None, False)]
    if others and not named:
        raise SaekitError(
            f"'{path}' asks for {others[0]} = {str(kwargs[others[0]])[:80]!r} of its model, which saekit does not do; "
            f"name the model that has it by --model"
        )
    return ModelWanted(asked_for(facts, hook), None if named or revision is None else str(revision), kind)


def text_rules(facts: Mapping[str, Any]) -> TextRules:
    """How contexts were made and which of their tokens counted."""
    excluded = facts.get("exclude_special_tokens") or ()
    return TextRules(
        separator=facts.get("sequence_separator_token", OWN),
        positions=() if (places := tuple(facts.get("seqpos_slice") or ())) == (None,) else places,
        excluded=excluded if excluded is True else tuple(excluded),
    )


def check_told(facts: Mapping[str, Any], path: str, hook: str, norm: str) -> None:
    """Refuse, or warn of, what a dictionary was trained on that is not done here.

    Args:
        facts: the metadata.
        path: what the user calls the dictionary.
        hook: where it is judged.
        norm: ``LN`` or ``RMS``, of the model.

    Raises:
        SaekitError: it belongs to one head alone.
    """
    if facts.get("hook_head_index") is not None:
        raise SaekitError(
            f"'{path}' is of head {facts['hook_head_index']} of '{hook}' alone (hook_head_index), which is not taken "
            f"apart here; judge it in Python by evaluate_activations"
        )
    told = []
    if facts.get("disable_concat_sequences"):
        told.append("was trained on the beginnings of documents alone (disable_concat_sequences), not on packed text")
    unfolded = norm.startswith("LN") and "fold_ln" not in asked_for(facts, hook)
    if unfolded and hook.endswith(".hook_normalized") and "saekit" not in facts and facts.get("sae_lens_version"):
        out = hook.removesuffix("normalized") + "out"
        told.append(f"was trained after the weights of the norm, which TransformerLens now calls '{out}'")
    for each in told:
        warnings.warn(f"'{path}' {each}: its figures here may differ", SaekitWarning, stacklevel=4)
