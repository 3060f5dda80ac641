"""What TransformerLens does to a model while it loads it, as far as text alone needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from saekit.special_tokens import special_tokens

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@contextmanager
def text_alone() -> Iterator[None]:
    """While it is entered, models are loaded without what prepares images or sound for them.

    TransformerLens (3.9 to 4.x) loads a multimodal model's processor and, where that fails, installs torchvision.
    """
    from transformers import AutoProcessor

    before = vars(AutoProcessor)["from_pretrained"]
    AutoProcessor.from_pretrained = staticmethod(lambda *args, **kwargs: None)
    try:
        yield
    finally:
        AutoProcessor.from_pretrained = before


def keep_own_tokens(model: TransformerBridge, trust_remote_code: bool = False) -> None:
    """Keep on the bridge what its tokenizer was before TransformerLens gave it tokens that it does not have.

    TransformerLens lets EOS stand for a BOS that is missing, and adds an EOS that is missing to the vocabulary: the
    model has no row for it, or one that nobody trained. ``saekit.special_tokens`` finds what is kept here.
    """
    from transformers import AutoTokenizer

    changed: Any = model.tokenizer
    try:
        own = AutoTokenizer.from_pretrained(changed.name_or_path, trust_remote_code=trust_remote_code)
    except Exception:  # one that is in no folder of its own, which the caller made
        own = changed
    model.special_tokens = special_tokens(own).within(int(model.cfg.d_vocab))
    model.text_tokenizer = own if len(own) < len(changed) else changed


def text_tokenizer(model: TransformerBridge) -> Any:
    """The tokenizer that makes text into the model's token ids."""
    return getattr(model, "text_tokenizer", None) or model.tokenizer
