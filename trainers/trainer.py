"""The training loop: activations in, a saved dictionary out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from saekit.activations import ShuffledStream
from saekit.errors import SaekitError, first_line
from saekit.files import check_free, replace_file, writable_folder
from saekit.kernels.workspace import Workspace
from saekit.sae import AffinityScale, SAEConfig, SparseAutoencoder
from saekit.selection import Selection
from saekit.trainers.auxiliary import POOLS, auxiliary_step
from saekit.trainers.backward import reconstruction_step
from saekit.trainers.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from saekit.trainers.config import TrainConfig
from saekit.trainers.data import TrainingData, resolved, training_data
from saekit.trainers.geometric_median import geometric_median
from saekit.trainers.interrupt import Interrupted, InterruptGuard
from saekit.trainers.optimizer import DictionaryAdam, learning_rate
from saekit.trainers.progress import TrainingProgress
from saekit.trainers.statistics import Statistics
from saekit.trainers.variant import Batch, Variant
from saekit.trainers.variants import VARIANTS
from saekit.zipf import ranks_of

CONFIG, METRICS, CHECKPOINTS, DICTIONARY = "config.yaml", "metrics.jsonl", "checkpoints", "sae"
STATISTICS, EVALUATION = "statistics.safetensors", "eval.json"
_SAMPLE = 16_384  # rows that the scale and b_dec start from


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        sae: the dictionary, in evaluation mode, for raw activations.
        path: the run's folder.
        config: what was asked, defaults filled in.
    """

    sae: SparseAutoencoder
    path: Path
    config: TrainConfig


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False, quiet: bool = False) -> Run:
    """Train a dictionary and save it.

    The run's folder receives ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, the dictionary in ``sae/`` and, of
    each feature, ``density``, ``rank``, ``since_fired``, ``smallest_kept`` and tensors of the variant (``budgets``) in
    ``statistics.safetensors``.

    Args:
        config: what to train.
        resume: go on from the newest checkpoint in ``config.out``; a finished run is loaded and returned.
        overwrite: replace a run that ``config.out`` holds.
        quiet: show no progress bar.

    Raises:
        SaekitError: the config, the data or the folder is not as it must be; or activations or loss are not finite.
        Interrupted: by SIGINT or SIGTERM, after the step was finished and the state saved.
    """
    import saekit

    if resume and overwrite:
        raise SaekitError("a run is either resumed or overwritten, not both")
    if resume:
        config = _config_to_resume(config)
        if (config.out / DICTIONARY / "cfg.json").exists():
            return Run(saekit.load(config.out), config.out, config)
    else:
        check_free(config.out, overwrite=overwrite, hint="choose another --out, or pass --resume or --overwrite")
    device = pick_device(config.device)
    data = training_data(config, device)
    stream = ShuffledStream(data.rows(), config.batch_size, data.buffer, config.seed)
    with closing(stream):
        trainer = Trainer(config, data, stream, device)  # everything that can be refused has been by now
        if resume:
            trainer.restore()
        else:
            _prepare_folder(trainer.config)
        trainer.run(quiet)
    return trainer.finish()


def pick_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        SaekitError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SaekitError(f"this machine has no device '{name}' ({first_line(error)}); use --device cpu") from error
    return device


def _config_to_resume(config: TrainConfig) -> TrainConfig:
    """The config that a run was started with; whatever was set anew must equal it."""
    written = config.out / CONFIG
    if not written.is_file():
        raise SaekitError(f"there is no run to resume in '{config.out}': {CONFIG} is missing")
    before = TrainConfig.from_yaml(written)
    asked = {key: getattr(config, key) for key in TrainConfig.model_fields if key in config.model_fields_set - {"out"}}
    changed = [key for key, value in asked.items() if value is not None and value != getattr(before, key)]
    if changed:
        raise SaekitError(f"the run in '{config.out}' was started with another {', '.join(changed)}")
    return before.model_copy(update={"out": config.out})


def _prepare_folder(config: TrainConfig) -> None:
    """Make the run's folder; what an earlier run left there goes."""
    writable_folder(config.out, overwrite=True)
    old = [*(config.out / name for name in (METRICS, STATISTICS, EVALUATION)), *checkpoints(config.out / CHECKPOINTS)]
    for path in [*old, *(config.out / DICTIONARY).glob("*")]:
        if path.is_file():
            path.unlink()
    replace_file(config.out / CONFIG, lambda path: path.write_text(config.to_yaml()))


class Trainer:
    """One run: its parameters, optimiser and statistics."""

    def __init__(self, config: TrainConfig, data: TrainingData, stream: ShuffledStream, device: torch.device) -> None:
        self.data, self.stream, self.device = data, stream, device
        rows, self.batches = _peek(iter(stream), _SAMPLE)
        self.d_in = rows.shape[1] // 2 if data.gradients else rows.shape[1]
        self.config = config = resolved(config, data.passport, self.d_in)
        assert config.width is not None
        assert config.dead_after is not None
        self.variant = VARIANTS[config.variant](config, config.width)
        self.sae, self.scale = initial_dictionary(config, self.variant, rows[:, : self.d_in].to(device))
        self.optimizer = DictionaryAdam(self.sae, config.clip)
        self.workspace = Workspace()
        self.statistics = Statistics(config.width, config.dead_after, device)
        self.step = 0

    def restore(self) -> None:
        """Go back to the newest checkpoint, if there is one, and past the batches that it was trained on.

        Raises:
            SaekitError: the checkpoint is damaged, or the data is not what the run was started on.
        """
        state = load_checkpoint(self.config.out / CHECKPOINTS, self.device)
        if state is None:
            return
        for field, value in self.data.passport.items():
            if state["passport"].get(field) != value:
                raise SaekitError(f"the data has another {field} than when the run in '{self.config.out}' was started")
        self.load_state_dict(state)
        if self.step < self.config.steps:
            next(itertools.islice(self.batches, self.step - 1, self.step), None)

    def run(self, quiet: bool = False) -> None:
        """All remaining steps; the last state is in a checkpoint when it returns or is interrupted."""
        config, folder = self.config, self.config.out / CHECKPOINTS
        self.stream.waited = 0.0
        with TrainingProgress(config, self.step, quiet) as progress, InterruptGuard() as guard:
            for rows in itertools.islice(self.batches, config.steps - self.step):
                rows = rows.to(self.device)
                gradients = rows[:, self.d_in :] if self.data.gradients else None
                metrics = self.train_step(rows[:, : self.d_in] * self.scale, gradients)
                self.step += 1
                last = self.step == config.steps
                if self.step % config.log_every == 0 or last:
                    progress.log(self.step, self._metrics(metrics))
                progress.advance()
                if self.step % config.checkpoint_every == 0 or last or guard.received:
                    save_checkpoint(folder, self.step, self.state_dict())
                if guard.received:
                    raise Interrupted(guard.received)

    def train_step(self, x: Float[Tensor, "n d"], gradients: Float[Tensor, "n d"] | None = None) -> dict[str, float]:
        """One optimiser step on one batch of scaled activations; gradients of the model's loss may have any scale."""
        sae, config = self.sae, self.config
        centred = x - sae.b_dec.detach()
        norms = centred.norm(dim=1) if _scale(config, self.variant) == "token_norm" else None
        select = Selection(
            centred,
            sae.W_enc.detach(),
            sae.b_enc.detach(),
            token_norms=norms,
            gradients=gradients,
            W_dec=sae.W_dec.detach(),
            rough=config.precision == "bf16_select",
            workspace=self.workspace,
        )
        code = self.variant.allocate(Batch(select, len(x), self.statistics, self.step / config.steps))
        fvu, error = reconstruction_step(sae, x, centred, code)
        aux, pool = self._auxiliary(centred, error)
        metrics = {"loss": float(fvu + config.aux_alpha * aux), "fvu": float(fvu), "l0": code.l0}
        if not math.isfinite(metrics["loss"]):
            raise SaekitError(f"the loss is {metrics['loss']} at step {self.step + 1}; a lower --lr may help")
        if config.aux != "none":
            metrics |= {"aux": float(aux), "aux_pool": pool}
        lr = learning_rate(self.step, config.steps, config.peak_lr, config.warmup, config.decay)
        norm = self.optimizer.step(lr)
        if not math.isfinite(norm):
            raise SaekitError(f"the gradient's norm is {norm} at step {self.step + 1}; a lower --lr may help")
        self.statistics.update(code, norms)
        return {**metrics, "grad_norm": norm, "lr": lr, "redone": select.redone}

    def _auxiliary(self, centred: Float[Tensor, "n d"], error: Float[Tensor, "n d"]) -> tuple[Tensor, int]:
        """Add the gradients of the auxiliary loss; returns it, 0 where its pool is empty, and the size of the pool."""
        choose = POOLS[self.config.aux]
        pool = None if choose is None else choose(self.statistics, self.config)
        if pool is None or not pool.any():
            return error.new_zeros(()), 0
        assert self.config.k_aux is not None
        loss = auxiliary_step(self.sae, centred, error, pool, self.config.k_aux, self.config.aux_alpha, self.workspace)
        return loss, int(pool.sum())

    def _metrics(self, latest: dict[str, float]) -> dict[str, float]:
        return {
            **latest,
            "tokens": float(self.statistics.tokens),
            "dead_share": float(self.statistics.dead(self.config.dead_after or 0).float().mean()),
            "waited_seconds": self.stream.waited,
        }

    @torch.no_grad()
    def finish(self) -> Run:
        """Calibrate, fold the scale in and save the dictionary."""
        sae = self.sae.eval()
        sae.zero_grad(set_to_none=True)
        self.variant.calibrate(sae, lambda: (x.to(self.device) * self.scale for x in self.data.calibration()))
        unscale(sae, self.scale)
        passport = self.data.passport
        sae.with_metadata(
            model_name=passport.get("model"),
            hook_name=passport.get("hook"),
            dataset_path=passport.get("dataset"),
            context_size=passport.get("context_length"),
            prepend_bos=passport.get("prepend_bos"),
            saekit={
                "variant": self.config.variant,
                "k": self.config.k,
                "training_tokens": self.statistics.tokens,
                "seed": self.config.seed,
                "activation_scale": self.scale,
                "cache": str(self.config.cache) if self.config.cache else None,
                "passport": passport,
                "aux": self.config.aux,
                **self.variant.facts(),
            },
        )
        figures = self._figures()
        replace_file(self.config.out / STATISTICS, lambda path: save_file(figures, path))
        sae.save(self.config.out / DICTIONARY, overwrite=True)
        return Run(sae, self.config.out, self.config)

    def _figures(self) -> dict[str, Tensor]:
        """What is known of each feature [F] at the end, in units of raw activations, and what the variant learned."""
        statistics = self.statistics
        unit = 1.0 if _scale(self.config, self.variant) == "token_norm" else self.scale
        return {
            "density": statistics.density,
            "rank": ranks_of(statistics.density) + 1,
            "since_fired": statistics.since_fired,
            "smallest_kept": statistics.smallest_kept / unit,
            **{name: value for name, value in self.variant.state_dict().items() if isinstance(value, Tensor)},
        }

    def state_dict(self) -> dict[str, object]:
        """Weights, optimiser and statistics; the stream's place follows from the step."""
        return {
            "sae": self.sae.state_dict(),
            "adam": self.optimizer.state_dict(),
            "statistics": self.statistics.state_dict(),
            "variant": self.variant.state_dict(),
            "scale": self.scale,
            "passport": self.data.passport,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go back to a checkpoint."""
        self.sae.load_state_dict(state["sae"])  # type: ignore[arg-type]
        self.optimizer.load_state_dict(state["adam"])  # type: ignore[arg-type]
        self.statistics.load_state_dict(state["statistics"])  # type: ignore[arg-type]
        self.variant.load_state_dict(state["variant"])  # type: ignore[arg-type]
        self.scale, self.step = float(state["scale"]), int(state["step"])  # type: ignore[arg-type, call-overload]


def _scale(config: TrainConfig, variant: Variant) -> AffinityScale:
    """By what affinities are divided before they are compared."""
    return config.affinity_scale if variant.compares_tokens else "none"


def _peek(batches: Iterator[Tensor], rows: int) -> tuple[Tensor, Iterator[Tensor]]:
    """About the first ``rows`` rows, as far as there are so many, and an iterator that still begins with them."""
    first: list[Tensor] = []
    for batch in batches:
        first.append(batch)
        if sum(map(len, first)) >= rows:
            break
    return torch.cat(first)[:rows], itertools.chain(first, batches)


def initial_dictionary(
    config: TrainConfig, variant: Variant, sample: Float[Tensor, "n d"]
) -> tuple[SparseAutoencoder, float]:
    """A dictionary to train on scaled activations, and the scale that gives them mean norm √d.

    Decoder rows are random unit vectors, the encoder starts as the decoder's transpose, b_dec as the geometric median
    of the scaled sample.

    Raises:
        SaekitError: the activations are all zero.
    """
    d_in = sample.shape[1]
    norm = float(sample.norm(dim=1).cpu().double().mean())
    if norm == 0:
        raise SaekitError("the activations are all zero")
    scale = d_in**0.5 / norm
    assert config.width is not None
    cfg = SAEConfig(
        d_in,
        config.width,
        variant.architecture,
        k=config.k if variant.architecture == "topk" else None,
        affinity_scale=_scale(config, variant) if variant.architecture == "jumprelu" else "none",
    )
    sae = SparseAutoencoder(cfg, device=sample.device)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        rows = torch.randn(cfg.d_sae, d_in, generator=generator).to(sample.device)
        sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.copy_(geometric_median(sample * scale))
    return sae, scale


@torch.no_grad()
def unscale(sae: SparseAutoencoder, scale: float) -> None:
    """Fold the activation scale into the dictionary, in place: afterwards it takes and gives raw activations.

    With x' = s·x: relu((s·x − b)W + c)/s = relu((x − b/s)W + c/s), so biases and thresholds are divided by s, while
    both matrices stay and decoder rows keep unit norm. A threshold in units of the token's norm stays too.
    """
    sae.b_enc.div_(scale)
    sae.b_dec.div_(scale)
    if sae.threshold is not None and sae.cfg.affinity_scale == "none":
        sae.threshold.div_(scale)
