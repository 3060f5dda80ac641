"""A model, a hook point and a text together: everything that activations come from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from saekit.activations.batch import ActivationBatch
from saekit.activations.boot import text_tokenizer
from saekit.activations.chat import TrainOn, check_template, template_fingerprint
from saekit.activations.finite import SAMPLE, BadTokens, norm_limit
from saekit.activations.gradients import LOSS
from saekit.activations.harvesting import a_pass, harvest
from saekit.activations.mixing import Source, by_weight, mixed
from saekit.activations.model import (
    EMBEDDED,
    check_hook,
    context_length_of,
    default_hook,
    load_model,
    model_revision,
)
from saekit.activations.passes import A_BATCH, that_fit
from saekit.activations.placement import NO_QUANTIZATION, cards_of, dtype_of, how_loaded, quantization_of
from saekit.activations.python_source import Split
from saekit.activations.rules import OWN_RULES, TextRules
from saekit.activations.settings import SourceSettings
from saekit.activations.spread import Harvester, Piece, assist, in_order
from saekit.activations.text import PYTHON, SPLITS, Documents, TextSource, open_text
from saekit.activations.token_store import stored
from saekit.activations.tokens import MASK, ContextBatch, Ids, encoded, pack, tokenizer_fingerprint
from saekit.errors import SaekitError, SaekitWarning
from saekit.processing import applied_to
from saekit.special_tokens import special_tokens

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

DEFAULT_CONTEXT = 256
_OF_THE_MODEL = {"model_dtype", "model_quantization", "model_device", "model_device_map"}
# contexts in a pass that ends at a hook, by it, whether gradients are taken, and the length of contexts
_fitting: WeakKeyDictionary[nn.Module, dict[tuple[str, bool, int], int]] = WeakKeyDictionary()


def piece_size(gradients: bool) -> int:
    """Contexts in a piece, by which streams and caches count their place.

    Where nothing else is asked for it is what the model takes in one pass; a backward pass holds the logits and more of
    each context.
    """
    return 8 if gradients else 32


@dataclass(frozen=True)
class ActivationSource:
    """Activations at one hook of one model on one text. Make one with ``ActivationSource.open``."""

    name: str
    model: TransformerBridge
    hook: str
    text: TextSource
    context_length: int
    prepend_bos: bool
    skip_first: int = 1
    rules: TextRules = OWN_RULES
    pool: int = 0
    data_seed: int = 0
    harvest_batch: int | None = None

    @classmethod
    def of(
        cls,
        settings: SourceSettings,
        *,
        device: str | None = None,
        trust_remote_code: bool = False,
        **more: Any,
    ) -> ActivationSource:
        """``open`` by settings; what dictionaries of others need too (``rules``, ``revision``, ...) stands beside them.

        Raises:
            SaekitError: as ``open``.
        """
        asked = settings.model_dump(exclude={"max_norm", *_OF_THE_MODEL})
        how = how_loaded(settings, device)
        return cls.open(**asked, **how, trust_remote_code=trust_remote_code, **more)

    @classmethod
    def open(
        cls,
        model: str = EMBEDDED,
        hook: str | None = None,
        dataset: str = PYTHON,
        *,
        column: str = "text",
        tokens_column: str | None = None,
        messages_column: str | None = None,
        train_on: TrainOn = "all",
        group_column: str | None = None,
        split: str = "train",
        dataset_config: str | None = None,
        streaming: bool = True,
        context_length: int | None = None,
        skip_first: int = 1,
        prepend_bos: bool | None = None,
        rules: TextRules = OWN_RULES,
        pool: int = 0,
        data_seed: int = 0,
        device: str | None = None,
        dtype: str = "float32",
        quantization: str = NO_QUANTIZATION,
        device_map: str | None = None,
        harvest_batch: int | None = None,
        revision: str | None = None,
        processing: Sequence[str] = (),
        loaded: TransformerBridge | None = None,
        trust_remote_code: bool = False,
    ) -> ActivationSource:
        """Open the text, load the model and check that they fit.

        Args:
            model: ``"embedded"``, a local Hugging Face folder or GGUF file, or a name on the hub.
            hook: TransformerLens hook point; the residual stream after half of the blocks if not given.
            dataset: what ``open_text`` takes.
            column, tokens_column, messages_column, train_on, group_column: as in ``open_text``.
            split, dataset_config, streaming: as in ``open_text``.
            context_length: tokens a context; 256, or the model's most where that is less, if not given.
            skip_first: positions at the start of each context that are not used.
            prepend_bos: whether contexts begin with BOS, where the tokenizer has one; what TransformerLens knows of the
                model's training if not given.
            rules: how else contexts are made, and which of their tokens count.
            pool: tokens of the text that contexts are drawn from (``mixed``); 0 keeps the order of the text.
            data_seed: of the order in which they are drawn.
            device, device_map: where the model runs, as in ``load_model``.
            dtype, quantization, revision, processing: of the model, as in ``load_model``.
            harvest_batch: contexts that the model takes at a time (``at_once``).
            loaded: the model itself, where it is loaded already.
            trust_remote_code: whether code that comes with the model may run.

        Raises:
            SaekitError: one of them does not exist, or the context is longer than the model's.
        """
        text = open_text(
            dataset,
            column=column,
            tokens_column=tokens_column,
            messages_column=messages_column,
            train_on=train_on,
            group_column=group_column,
            split=split,
            dataset_config=dataset_config,
            streaming=streaming,
        )
        if loaded is None:
            loaded = load_model(
                model,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                revision=revision,
                processing=processing,
                quantization=quantization,
                device_map=device_map,
            )
        bridge = loaded
        hook = hook or default_hook(bridge)
        check_hook(bridge, hook)
        longest = context_length_of(bridge)
        length = context_length or min(longest, DEFAULT_CONTEXT)
        if length > longest:
            raise SaekitError(f"a context of {length} tokens is longer than the {longest} that '{model}' takes")
        wanted = bool(getattr(bridge.cfg, "default_prepend_bos", True)) if prepend_bos is None else prepend_bos
        bos = wanted and special_tokens(bridge).bos is not None
        text = text.within(int(bridge.cfg.d_vocab))
        if messages_column is not None:
            check_template(text_tokenizer(bridge), model)
        return cls(model, bridge, hook, text, length, bos, skip_first, rules, pool, data_seed, harvest_batch)

    def at(self, hook: str) -> ActivationSource:
        """The same model and text at another hook point.

        Raises:
            SaekitError: the model has no such hook.
        """
        check_hook(self.model, hook)
        return replace(self, hook=hook)

    def at_once(self, gradients: bool = False) -> int:
        """Contexts that the model takes at a time (``in_passes``): as asked for, else by the memory of its cards.

        Found once for a model; ``A_BATCH`` where it lies on no card.
        """
        cards = cards_of(self.model)
        if self.harvest_batch is not None or not cards:
            return self.harvest_batch or A_BATCH
        known, key = _fitting.setdefault(self.model, {}), (self.hook, gradients, self.context_length)
        if key not in known:
            with a_pass(self.model, self.hook, gradients) as run:
                known[key] = that_fit(run, cards, self.context_length)
        return known[key]

    def contexts(self, part: Split, batch: int = 32) -> Iterator[ContextBatch]:
        """Contexts of one part of the text, in its own order.

        Raises:
            SaekitError: the part does not fill one context, or no token of it counts.
        """
        empty, counted, tokenizer = True, False, text_tokenizer(self.model)
        group, role = self.text.facts.get("group_column"), self.text.facts.get("train_on", "all")
        for contexts in pack(
            self._tokenised(part, tokenizer),
            tokenizer,
            self.context_length,
            prepend_bos=self.prepend_bos,
            contexts=batch,
            special=self.rules.special(special_tokens(self.model), tokenizer),
            skip_first=self.skip_first,
        ):
            contexts = self.rules.narrowed(contexts, tokenizer)
            empty, counted = False, counted or bool(contexts.kept.any())
            yield contexts
        if empty:
            raise SaekitError(
                f"the {part} part of '{self.text.name}' is empty or shorter than one context of "
                f"{self.context_length} tokens"
                + (f"; the column '{group}' has too few values to divide it" if group else "")
            )
        if not counted:
            whose = "" if role == "all" else f": there is no message of '{role}'"
            raise SaekitError(f"no token of the {part} part of '{self.text.name}' counts{whose}")

    def _tokenised(self, part: Split, tokenizer: Any) -> Iterator[Ids]:
        """The token ids of each document; those of a mix by the weights of its texts."""
        if not self.text.shares:
            return self._ids(self.text, part, tokenizer)

        def tell(name: str, tokens: int) -> None:
            told = f"'{name}' in the mix ran out after {tokens:,} tokens of its {part} part and begins again"
            warnings.warn(told, SaekitWarning, stacklevel=2)

        texts = [Source(t.name, share, partial(self._ids, t, part, tokenizer)) for t, share in self.text.shares]
        return by_weight(texts, tell)

    def check_parts(self) -> None:
        """Raise SaekitError where a part of the text, of each one of a mix, does not fill one context."""
        for text in [share.text for share in self.text.shares] or [self.text]:
            for part in SPLITS:
                found = next(replace(self, text=text).contexts(part))
                if self.text.shares and found.tokens.shape[1] < self.context_length:
                    told = f"does not fill one context of {self.context_length} tokens, as each text of a mix must"
                    raise SaekitError(f"the {part} part of '{text.name}' {told}")

    def _ids(self, text: TextSource, part: Split, tokenizer: Any) -> Iterator[Ids]:
        """The token ids of each document of a text, kept on the disk where it can be told from others."""
        documents = text.documents(part)
        if isinstance(text.documents, Documents):
            template = [template_fingerprint(tokenizer)] if self.text.facts.get("messages_column") else []
            return stored([*text.documents.key, part, *template], documents, tokenizer)
        return encoded(documents, tokenizer)

    def mixed(
        self, part: Split, batch: int = 32, *, lap: int = 0, short: Callable[[int], object] | None = None
    ) -> Iterator[ContextBatch]:
        """``contexts`` drawn at random from a pool of ``pool`` tokens; where that is 0, as they come.

        Args:
            part: the part.
            batch: contexts a batch.
            lap: number of the pass over the text, each of which has an order of its own.
            short: called with the tokens of the part before the first is handed on, where they do not fill the pool.

        Raises:
            SaekitError: the part does not fill one context.
        """
        if not self.pool:
            return self.contexts(part, batch)
        pool = max(1, self.pool // self.context_length)
        contexts = replace(self, text=self.text.reordered((lap << 31) + self.data_seed)).contexts(part, batch)
        return mixed(contexts, pool, f"{self.data_seed} {lap} {part}", size=batch, short=short)

    def batches(
        self,
        part: Split,
        tokens: int | None = None,
        *,
        gradients: bool = False,
        bad: BadTokens | None = None,
        first: int = 0,
        together: bool = False,
    ) -> Generator[ActivationBatch, None, None]:
        """Activations of one part of the text, mixed, cut after exactly ``tokens`` rows where that is given.

        The first ``first`` batches of contexts are passed over, without the model; ``together`` shares the harvest out
        among the processes of this run, which all ask for it (``spread``). Further arguments are those of ``harvest``.
        """
        left, harvester = tokens, self._harvester(part, gradients)
        pieces = in_order(harvester, bad or BadTokens(), first) if together else harvester.alone(bad, first)
        with closing(pieces):
            for batch in (ActivationBatch(*piece) for piece in pieces):
                if left is not None and len(batch.x) >= left:
                    yield batch.rows(0, left)
                    return
                left = left if left is None else left - len(batch.x)
                yield batch

    def assist(self, part: Split, *, gradients: bool = False, bad: BadTokens | None = None) -> None:
        """Take part in ``batches`` that others ask for ``together``, as long as they do, without a row of one's own.

        Raises:
            SaekitError: as ``batches``.
            Interrupted: this process was asked to stop, once the others have.
        """
        assist(in_order(self._harvester(part, gradients), bad or BadTokens(), None))

    def _harvester(self, part: Split, gradients: bool) -> Harvester:
        """How batches of one part come about."""

        def run(
            contexts: Iterator[ContextBatch], bad: BadTokens, at_once: int, numbers: Iterable[int]
        ) -> Iterator[Piece]:
            manner: Any = {"gradients": gradients, "bad": bad, "numbers": numbers, "at_once": at_once}
            found = harvest(self.model, self.hook, contexts, **manner)
            return (tuple(column for column in batch if column is not None) for batch in found)

        def contexts(first: int) -> Iterator[ContextBatch]:
            return islice(self.mixed(part, piece_size(gradients)), first, None)

        return Harvester(contexts, run, self.at_once(gradients), piece_size(gradients))

    def norm_limit(self, max_norm: float) -> float:
        """The largest ‖x‖: ``max_norm`` times the median of the first 16,384 finite tokens of the training text."""
        return norm_limit(self.batches("train", SAMPLE, bad=BadTokens(skip=True)), max_norm)

    def fingerprints(self) -> dict[str, str]:
        """What changes when the text does, or the chat template that renders it."""
        found = {"dataset_fingerprint": self.text.fingerprint}
        if self.text.facts.get("messages_column"):
            found["chat_template"] = template_fingerprint(text_tokenizer(self.model))
        return found

    def provenance(self, part: Split, *, gradients: bool = False) -> dict[str, Any]:
        """The facts by which data of this source is known again."""
        return {
            "model": self.name,
            "revision": model_revision(self.model, self.name),
            "model_dtype": str(dtype_of(self.model)).removeprefix("torch."),
            "model_quantization": quantization_of(self.model),
            "hook": self.hook,
            "dataset": self.text.name,
            **self.fingerprints(),
            **self.text.facts,
            "part": part,
            "tokenizer": tokenizer_fingerprint(text_tokenizer(self.model)),
            "context_length": self.context_length,
            "prepend_bos": self.prepend_bos,
            "skip_first": self.skip_first,
            "pool": self.pool,
            "data_seed": self.data_seed,
            "mask": MASK,
            **self.rules.facts(),
            **({"harvest_batch": size} if part == "train" and (size := self.at_once(gradients)) else {}),
            **({"processing": list(processing)} if (processing := applied_to(self.model)) else {}),
            **({"gradients": LOSS} if gradients else {}),
        }
