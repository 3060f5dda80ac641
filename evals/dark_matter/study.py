"""Several dictionaries of one hook point, their errors taken apart on the same tokens and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations import Harvest
from saekit.errors import SaekitError
from saekit.evals.dark_matter.decomposition import DarkMatter
from saekit.evals.dark_matter.earlier_parts import EarlierParts
from saekit.evals.dark_matter.error_batch import ErrorBatch
from saekit.evals.dark_matter.scaling import TokenScaling, alike, width_scaling
from saekit.evals.dark_matter.splits import SplitKind, in_test_half
from saekit.evals.gradient_pursuit import encode_by_pursuit
from saekit.sae import SparseAutoencoder

Figures = dict[str, Any]
SPLIT: SplitKind = "document"  # of figures that take one split only: it leaks no text between the halves


@dataclass
class ErrorStudy:
    """Dictionaries of one hook point, and what to ask of them.

    Attributes:
        dictionaries: by name; all for activations at ``hook``.
        hook: their hook point.
        earlier: dictionaries of other hook points by name, with those: do their reconstructions predict the errors?
        pursuit: whether to encode by gradient pursuit too.
        seed: of the splits.
        analyses: what was found of each dictionary, after ``run``.
    """

    dictionaries: Mapping[str, SparseAutoencoder]
    hook: str
    earlier: Mapping[str, tuple[str, SparseAutoencoder]] = field(default_factory=dict)
    pursuit: bool = False
    seed: int = 0
    analyses: dict[str, DarkMatter] = field(default_factory=dict, init=False)

    @torch.no_grad()
    def run(self, batches: Callable[[list[str]], Iterable[Harvest]]) -> tuple[dict[str, Figures], Figures]:
        """Go over the tokens twice.

        Args:
            batches: makes the same batches each time it is called, with activations of the hook points asked for.

        Returns:
            The figures of each dictionary (``DarkMatter.result``; l0; ``pursuit`` and ``earlier_parts`` where they were
            asked for), and those that compare dictionaries: ``width`` (FVU and FVU_nonlinear against width, for each
            group of like L0), ``token`` (one's error predicted from another's) and ``left_out`` (which groups have no
            comparison of widths, and why).

        Raises:
            SaekitError: a dictionary does not fit the activations, or there are too few tokens or documents.
        """
        d = {sae.cfg.d_in for sae in self.dictionaries.values()}
        if len(d) != 1:
            raise SaekitError(f"dictionaries of different widths d_in ({sorted(d)}) cannot be of one hook point")
        width = d.pop()
        self.analyses = {name: DarkMatter(width, self.seed) for name in self.dictionaries}
        pursued = {name: DarkMatter(width, self.seed) for name in self.dictionaries} if self.pursuit else {}
        parts = {name: sae.cfg.d_in for name, (_, sae) in self.earlier.items()}
        predicted = {name: EarlierParts(parts, width) for name in self.dictionaries} if parts else {}
        matches = {name: [0, 0] for name in self.dictionaries}  # of the dictionary's own encoder, and of pursuit
        tokens = 0
        for found in batches(list(dict.fromkeys([self.hook, *(hook for hook, _ in self.earlier.values())]))):
            before = self._reconstructions(found)
            tokens += len(found.batches[self.hook].x)
            for name, sae in self.dictionaries.items():
                batch = self._batch(sae, found)
                self.analyses[name].update(batch)
                matches[name][0] += int(batch.l0.sum()) if batch.l0 is not None else 0
                if self.pursuit:
                    code = encode_by_pursuit(sae, batch.x)
                    pursued[name].update(batch._replace(x_hat=sae.decode(code)))
                    matches[name][1] += len(code.values)
                if parts:
                    assert batch.documents is not None
                    predicted[name].update(before, batch.x, batch.x_hat, in_test_half(batch.documents, self.seed))
        if not tokens:
            raise SaekitError("there are no activations to take apart")
        if tokens < (least := 4 * sum(parts.values())):
            raise SaekitError(
                f"{tokens:,} tokens are too few to regress on {len(parts)} earlier parts; give at least {least:,}"
            )
        for analysis in [*self.analyses.values(), *pursued.values()]:
            analysis.fit()
        scaling = TokenScaling(list(self.dictionaries))
        for found in batches([self.hook]):
            norms = {
                name: self.analyses[name].examine(self._batch(sae, found)) for name, sae in self.dictionaries.items()
            }
            scaling.update(norms)
        figures = {}
        for name, analysis in self.analyses.items():
            figures[name] = {"l0": matches[name][0] / tokens, **analysis.result()}
            if self.pursuit:
                figures[name]["pursuit"] = {"l0": matches[name][1] / tokens, **pursued[name].explained(SPLIT)}
            if parts:
                figures[name]["earlier_parts"] = predicted[name].result(analysis.b[SPLIT], analysis.moments(SPLIT))
        return figures, self._compared(figures, scaling)

    def _batch(self, sae: SparseAutoencoder, found: Harvest) -> ErrorBatch:
        rows = found.batches[self.hook]
        x = rows.x.to(sae.W_dec.device)  # in its own dtype: the error is of what the model has
        code = sae.encode_sparse(x)
        return ErrorBatch(x, sae.decode(code), rows.documents, rows.tokens, code.matches_per_token(), found.losses)

    def _reconstructions(self, found: Harvest) -> dict[str, Float[Tensor, "m w"]]:
        return {name: sae(found.batches[hook].x.to(sae.W_dec.device)) for name, (hook, sae) in self.earlier.items()}

    def _compared(self, figures: dict[str, Figures], scaling: TokenScaling) -> Figures:
        """What only several dictionaries show together."""
        widths = {name: sae.cfg.d_sae for name, sae in self.dictionaries.items()}
        groups, token, left_out = [], [], []
        for group in alike({name: found["l0"] for name, found in figures.items()}):
            names = sorted(group, key=lambda name: widths[name])
            token += [
                {"small": small, "large": large, **scaling.between(small, large)}
                for i, small in enumerate(names)
                for large in names[i + 1 :]
                if widths[small] < widths[large]
            ]
            if len({widths[name] for name in names}) == len(names) > 1:
                groups.append(self._against_width(names, [widths[name] for name in names], figures))
            elif len(names) > 1:
                left_out.append({"dictionaries": names, "why": "several have the same width"})
        return {"width": groups, "token": token, "left_out": left_out}

    def _against_width(self, names: list[str], widths: list[int], figures: dict[str, Figures]) -> Figures:
        blocks = {name: {k: np.array(v) for k, v in figures[name]["blocks"].items()} for name in names}
        variance = blocks[names[0]]["variance"]

        def scaled(part: str) -> Figures:
            return width_scaling(widths, np.stack([blocks[name][part] for name in names]), variance, self.seed)

        l0 = [figures[name]["l0"] for name in names]
        return {"dictionaries": names, "l0": l0, "total": scaled("error"), "nonlinear": scaled("nonlinear")}
