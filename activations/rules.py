"""How a text was made into contexts, and which of their tokens counted, where it was done otherwise than here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from saekit.activations.tokens import ContextBatch
from saekit.errors import SaekitError
from saekit.special_tokens import SpecialTokens

OWN = "own"


@dataclass(frozen=True)
class TextRules:
    """Rules of SAELens, as the metadata of its dictionaries tell them.

    Attributes:
        separator: what stands between documents: a token id, ``bos``, ``eos``, ``sep``, or None for nothing; ``own``
            for what stands there without such a rule.
        positions: start, stop and step of the positions of a context that count; empty for all.
        excluded: ids of tokens that do not count; True for all special ones.
    """

    separator: int | str | None = OWN
    positions: tuple[int | None, ...] = ()
    excluded: tuple[int, ...] | Literal[True] = ()

    def special(self, own: SpecialTokens, tokenizer: Any) -> SpecialTokens:
        """The special tokens to pack with."""
        if self.separator == OWN:
            return own
        named = {"bos": own.bos, "eos": getattr(tokenizer, "eos_token_id", None)}
        named["sep"] = getattr(tokenizer, "sep_token_id", None)
        token = named.get(self.separator) if isinstance(self.separator, str) else self.separator
        return own._replace(separator=token)

    def packing(self) -> TextRules:
        """The same contexts with all positions of text kept, for who narrows them later."""
        return replace(self, positions=(), excluded=())

    def narrowed(self, contexts: ContextBatch, tokenizer: Any) -> ContextBatch:
        """The contexts with those positions alone kept that count.

        Raises:
            SaekitError: no position of a context does.
        """
        kept = contexts.kept
        if self.positions:
            length = kept.shape[1]
            try:
                places = range(length)[slice(*self.positions)]
            except (TypeError, ValueError):
                places = range(0)
            if not places:
                raise SaekitError(f"seqpos_slice = {list(self.positions)} leaves nothing of {length} positions")
            where = torch.zeros(length, dtype=torch.bool)
            where[list(places)] = True
            kept = kept & where
        excluded = tuple(tokenizer.all_special_ids) if self.excluded is True else self.excluded
        if excluded:
            kept = kept & ~torch.isin(contexts.tokens, torch.tensor(excluded))
        return contexts._replace(kept=kept)

    def facts(self) -> dict[str, Any]:
        """What a provenance says of them, in the words of SAELens."""
        facts: dict[str, Any] = {} if self.separator == OWN else {"sequence_separator_token": self.separator}
        if self.positions:
            facts["seqpos_slice"] = list(self.positions)
        if self.excluded:
            facts["exclude_special_tokens"] = self.excluded if self.excluded is True else list(self.excluded)
        return facts


OWN_RULES = TextRules()
