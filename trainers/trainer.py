"""One training run: a dictionary, its optimiser and statistics, and the step that moves them."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from saekit.activations.manifest import first_change
from saekit.activations.stream import StreamState
from saekit.errors import SaekitError, SaekitWarning
from saekit.files import replace_file
from saekit.kernels.workspace import Workspace
from saekit.machine import Machine, differences, this_machine
from saekit.selection import Selection
from saekit.trainers.auxiliary import Auxiliary
from saekit.trainers.auxiliary_losses import AUXILIARY, AuxK
from saekit.trainers.calibration import Heldout
from saekit.trainers.checkpoint import checkpoints, save_checkpoint
from saekit.trainers.config import OLD_NAMES, TrainConfig
from saekit.trainers.data import TrainingData, resolved
from saekit.trainers.dictionary import Units, affinity_scale, empty_dictionary, initialise, unscale
from saekit.trainers.divergence import Divergence
from saekit.trainers.initial import start_from
from saekit.trainers.optimizer import DictionaryAdam, learning_rate
from saekit.trainers.run_folder import CHECKPOINTS, CONFIG, DICTIONARY, STATISTICS, Run, begin_replacing
from saekit.trainers.statistics import Statistics
from saekit.trainers.terms import Step, Term
from saekit.trainers.variant import Batch
from saekit.trainers.variants import VARIANTS
from saekit.zipf import ranks_of


class Trainer:
    """One run: its parameters, optimiser and statistics."""

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        sample: Float[Tensor, "n w"] | None,
        device: torch.device,
        workspace: Workspace | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Begin a run, or go on with one.

        Args:
            config: what to train.
            data: where the activations come from.
            sample: the first rows of the stream, which decide about the units; not needed with ``state``.
            device: where to train.
            workspace: buffers that trainers may share which take turns.
            state: a checkpoint to go on from.

        Raises:
            SaekitError: the config does not fit the data, or one of them is not that of the checkpoint.
        """
        self.data, self.device = data, device
        if state is not None:
            self.d_in = int(state["sae"]["W_dec"].shape[1])
        else:
            assert sample is not None
            sample = sample[:, data.columns].contiguous()
            self.d_in = sample.shape[1] // 2 if data.gradients else sample.shape[1]
        self.config = config = resolved(config, data.provenance, self.d_in)
        assert config.width is not None
        assert config.dead_after is not None
        self.variant = VARIANTS[config.variant](config, config.width)
        self.sae = empty_dictionary(config, self.variant, self.d_in, device)
        self.workspace = workspace or Workspace()
        self.statistics = Statistics(config.width, config.dead_after, device)
        self.divergence = Divergence()
        self.machines = [this_machine(device)]
        self.step = 0
        if state is not None:
            self._check_same(state)
            self.sae.load_state_dict(state["sae"])
        else:
            assert sample is not None
            self.units = initialise(self.sae, sample[:, : self.d_in].to(device), config.seed)
            self.initial = start_from(config.init, self.sae, self.units) if config.init else None
        self.variant.begin(self.sae)
        self.terms = [*self.variant.terms(), *_auxiliary(config)]
        self.optimizer = DictionaryAdam(self.sae, config.clip, self.variant.parameters())
        if state is not None:
            self.load_state_dict(state)

    def _check_same(self, state: dict[str, Any]) -> None:
        """Raise SaekitError where data or config are not those that a checkpoint was made with."""
        if field := first_change(state["provenance"], self.data.provenance):
            raise SaekitError(f"the data has another {field} than when the run in '{self.config.out}' was started")
        settings = _lasting(self.config)
        before = {"pool": 0, **{OLD_NAMES.get(name, name): value for name, value in state["config"].items()}}
        if before["tokens"] < settings["tokens"] and int(state["step"]) == before["tokens"] // self.config.batch_size:
            before["tokens"] = settings["tokens"]  # it was finished, and goes on with more
        changed = [name for name, value in before.items() if name in settings and settings[name] != value]
        if changed:
            raise SaekitError(
                f"'{self.config.out / CONFIG}' has another {', '.join(changed)} than the checkpoint, which has "
                + ", ".join(f"{name} = {before[name]}" for name in changed)
            )

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes that the checkpoints and the dictionary will take beside those that are there."""
        parameters = sum(p.numel() for p in self.optimizer.parameters.values()) * 4
        there = sum(path.stat().st_size for path in checkpoints(self.config.out / CHECKPOINTS).values())
        return max(0, 3 * 3 * parameters + parameters - there)  # three at a time, each with Adam's moments

    def advance(self, rows: Float[Tensor, "n w"]) -> dict[str, float]:
        """One step on one batch of the stream; returns what ``train_step`` does.

        Raises:
            SaekitError: the loss or its gradient is not finite.
        """
        rows = rows[:, self.data.columns].to(self.device, non_blocking=rows.is_pinned())
        gradients = rows[:, self.d_in :] if self.data.gradients else None
        metrics = self.train_step(self.units(rows[:, : self.d_in]), gradients)
        self.step += 1
        return metrics

    def line(self, latest: dict[str, float], waited: float) -> dict[str, float]:
        """What a line of metrics tells: the latest step's figures and those of the run so far."""
        return {
            **latest,
            **({"skipped_tokens": float(self.data.bad.count)} if self.data.bad.leaves_out else {}),
            "tokens": float(self.statistics.tokens),
            "dead_share": float(self.statistics.dead(self.config.dead_after or 0).float().mean()),
            "waited_seconds": waited,
        }

    def save(self, stream: StreamState) -> None:
        """Write a checkpoint; ``stream`` is where the stream stands.

        A state that may have begun to diverge is not written: it would push out an older one.
        """
        if not self.divergence.suspect:
            rest = None if stream.rest is None else stream.rest[:, self.data.columns]
            state = {**self.state_dict(), "stream": stream._replace(rest=rest)._asdict()}
            save_checkpoint(self.config.out / CHECKPOINTS, self.step, state, self._described())

    def _described(self) -> dict[str, Any]:
        """What a checkpoint must tell to be read as a dictionary, beside the state."""
        cfg = self.sae.cfg
        rule = {"architecture": cfg.architecture, "k": cfg.k, "affinity_scale": cfg.affinity_scale}
        return {**rule, "scale": self.units.scale, "metadata": self._facts()}

    def train_step(self, x: Float[Tensor, "n d"], gradients: Float[Tensor, "n d"] | None = None) -> dict[str, float]:
        """One optimiser step on activations in the run's units; gradients of the model's loss may have any scale."""
        sae, config = self.sae, self.config
        centred = x - sae.b_dec.detach()
        norms = centred.norm(dim=1) if affinity_scale(config, self.variant) == "token_norm" else None
        select = Selection(
            centred,
            sae.W_enc.detach(),
            sae.b_enc.detach(),
            token_norms=norms,
            gradients=gradients,
            W_dec=sae.W_dec.detach(),
            approximate=config.precision == "bf16_select",
            workspace=self.workspace,
        )
        done = self.step / config.steps
        code = self.variant.allocate(Batch(select, len(x), self.statistics, done))
        step = Step(sae, x, centred, code, norms, self.statistics, done, self.workspace)
        self.optimizer.begin_step(overwritten=self.terms[0].overwrites)
        losses = {term.name: term.add(step) for term in self.terms}
        loss = sum(term.weight * losses[term.name] for term in self.terms)
        metrics = {"loss": float(loss), "fvu": float(step.fvu), "l0": code.l0}
        self._check_finite(metrics["loss"], "loss", step.error)
        for term in self.terms:
            metrics |= {term.name: float(losses[term.name]), **term.figures()}
        lr = learning_rate(self.step, config.steps, config.peak_lr, config.warmup, config.decay)
        norm = self.optimizer.step(lr)
        self._check_finite(norm, "gradient's norm")
        self.divergence.update(metrics["fvu"], self.step)
        self.statistics.update(code, norms)
        return {**metrics, "grad_norm": norm, "lr": lr, "rescored": select.rescored}

    def _check_finite(self, value: float, what: str, error: Tensor | None = None) -> None:
        """Raise SaekitError where the loss or its gradient is not finite."""
        if math.isfinite(value):
            return
        rows = [] if error is None else (~torch.isfinite(error.square().sum(1))).nonzero().flatten().tolist()
        where = f", in row {rows[0]} of its batch" if rows else ""
        raise SaekitError(
            f"the {what} is {value} at step {self.step + 1}{where}; the last good checkpoint is kept; "
            f"a lower --lr may help"
        )

    @torch.no_grad()
    def finish(self) -> Run:
        """Calibrate, fold the units in and save the dictionary."""
        sae = self.sae.eval()
        sae.zero_grad(set_to_none=True)
        heldout = Heldout(lambda: (self.units(x.to(self.device)) for x in self.data.calibration()))
        self.variant.calibrate(sae, heldout)
        unscale(sae, self.units)
        sae.with_metadata(**self._facts())
        figures = self._figures()
        begin_replacing(self.config.out)
        replace_file(self.config.out / STATISTICS, lambda path: save_file(figures, path))
        sae.save(self.config.out / DICTIONARY, overwrite=True)
        return Run(sae, self.config.out, self.config)

    def _facts(self) -> dict[str, Any]:
        """What the dictionary's metadata tell of the run."""
        provenance = self.data.provenance
        return {
            "model_name": provenance.get("model"),
            "hook_name": provenance.get("hook"),
            "dataset_path": provenance.get("dataset"),
            "context_size": provenance.get("context_length"),
            "prepend_bos": provenance.get("prepend_bos"),
            "saekit": {
                "variant": self.config.variant,
                "k": getattr(self.config, "k", None),
                "training_tokens": self.statistics.tokens,
                "seed": self.config.seed,
                "activation_scale": self.units.scale,
                "cache": str(self.config.cache) if self.config.cache else None,
                "provenance": provenance,
                "skipped_tokens": self.data.bad.count,
                "aux": self.config.aux,
                **({} if self.initial is None else {"init": self.initial}),
                "ran_on": self.machines,
                **self.variant.facts(),
            },
        }

    def _figures(self) -> dict[str, Tensor]:
        """What is known of each feature [F] at the end, in units of raw activations, and what the variant learned."""
        statistics = self.statistics
        unit = 1.0 if affinity_scale(self.config, self.variant) == "token_norm" else self.units.scale
        return {
            "density": statistics.density,
            "rank": ranks_of(statistics.density) + 1,
            "since_fired": statistics.since_fired,
            "smallest_kept": statistics.smallest_kept / unit,
            **{name: value for name, value in self.variant.state_dict().items() if isinstance(value, Tensor)},
            **{name: value.detach() for name, value in self.variant.parameters().items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser and statistics, and what they were made with.

        There is no random state: every random choice follows from the seed and a number (of a fill, of an epoch).
        """
        return {
            "sae": self.sae.state_dict(),
            "adam": self.optimizer.state_dict(),
            "statistics": self.statistics.state_dict(),
            "divergence": self.divergence.state_dict(),
            "variant": self.variant.state_dict(),
            "rule": {name: value.clone() for name, value in self.variant.running_rule(self.statistics).items()},
            "learned": {name: value.detach() for name, value in self.variant.parameters().items()},
            "scale": self.units.scale,
            "centre": self.units.centre,
            "initial": self.initial,
            "step": self.step,
            "provenance": self.data.provenance,
            "config": _lasting(self.config),
            "ran_on": self.machines,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint."""
        self.sae.load_state_dict(state["sae"])
        for name, value in state.get("learned", {}).items():
            self.variant.parameters()[name].copy_(value)
        self.optimizer.load_state_dict(state["adam"])
        self.statistics.load_state_dict(state["statistics"])
        self.divergence.load_state_dict(state["divergence"])
        self.variant.load_state_dict(state["variant"])
        self.units = Units(state["centre"], float(state["scale"]))
        self.initial = state.get("initial")
        self.step = int(state["step"])
        before: list[Machine] = state.get("ran_on", [{}])
        if other := differences(before[-1], self.machines[-1]):
            told = f"the run goes on on another machine ({other}), so it will not be that of one machine bit for bit"
            warnings.warn(told, SaekitWarning, stacklevel=2)
        self.machines = before if before[-1] == self.machines[-1] else before + self.machines


def stream_state(*states: dict[str, Any] | None) -> StreamState | None:
    """Where the stream stood when checkpoints of the same step were written, their columns of it side by side."""
    streams = [StreamState(**state["stream"]) for state in states if state is not None]
    if not streams:
        return None
    rests = [stream.rest.cpu() for stream in streams if stream.rest is not None]
    return streams[0]._replace(rest=torch.cat(rests, dim=1) if rests else None)


def _auxiliary(config: TrainConfig) -> list[Term]:
    """The term of the run's auxiliary loss, if it has one."""
    kind, settings, dead_after = AUXILIARY[config.aux], config.aux_settings, config.optimizer.dead_after
    if not (issubclass(kind, AuxK) and isinstance(settings, AuxK.Config)):
        return []
    assert settings.k_aux is not None
    assert dead_after is not None
    pool = partial(kind.pool, settings=settings, dead_after=dead_after)
    return [Auxiliary(pool, settings.k_aux, settings.aux_alpha)]


def _lasting(config: TrainConfig) -> dict[str, Any]:
    """What of a config may not change while a run goes on."""
    keys = config.keys_with("decides") - config.keys_with("resumable")
    return config.to_dict({"variant", "aux", *keys})
