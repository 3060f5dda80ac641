"""Train one dictionary: from a config to a run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from saekit.files import check_space
from saekit.machine import pick_device
from saekit.trainers.checkpoint import load_checkpoints
from saekit.trainers.config import TrainConfig
from saekit.trainers.data import training_data
from saekit.trainers.loggers import check_installed
from saekit.trainers.loop import take_steps
from saekit.trainers.run_folder import (
    CHECKPOINTS,
    Run,
    check_manner,
    check_new,
    finished_run,
    prepared_folder,
    resumed_folder,
)
from saekit.trainers.trainer import Trainer, stream_state

SAMPLE = 16_384  # rows of the stream that decide about the units of training


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    trust_remote_code: bool = False,
) -> Run:
    """Train a dictionary and save it.

    The run's folder receives ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, the dictionary in ``sae/`` and, of
    each feature, ``density``, ``rank``, ``since_fired``, ``smallest_kept`` and tensors of the variant (``budgets``) in
    ``statistics.safetensors``.

    Args:
        config: what to train.
        resume: go on from the newest checkpoint in ``config.out``; a finished run is loaded and returned.
        overwrite: replace a run that ``config.out`` holds.
        quiet: show no progress bar.
        trust_remote_code: whether code that comes with the model may run; no setting of ``config.yaml``, which may
            come from others.

    Raises:
        SaekitError: the config, the data or the folder is not as it must be; or activations or loss are not finite.
        WriteError: the disk is full or not to be written to; the last checkpoint is kept.
        Interrupted: by SIGINT or SIGTERM, after the step was finished and the state saved.
    """
    check_manner(resume, overwrite)
    with ExitStack() as stack:
        if resume:
            config = stack.enter_context(resumed_folder(config))
            if (finished := finished_run(config)) is not None:
                return finished
        else:
            check_new(config, overwrite=overwrite)
        check_installed(config.log)
        device = pick_device(config.device)
        newest = load_checkpoints([config.out / CHECKPOINTS], device) if resume else None
        state = newest[1][0] if newest else None
        data = training_data(config, device, trust_remote_code, state and state["provenance"])
        stream = stack.enter_context(closing(data.stream(config, stream_state(state))))
        sample = stream.peek(SAMPLE) if state is None else None
        trainer = Trainer(config, data, sample, device, state=state)  # all that can be refused has been by now
        del newest, state  # as large as the run itself
        check_room([trainer], config.out)
        if not resume:
            stack.enter_context(prepared_folder(trainer.config, overwrite=overwrite))
        take_steps([trainer], stream, quiet)
        return trainer.finish()


def check_room(trainers: Sequence[Trainer], folder: Path) -> None:
    """Raise WriteError where the checkpoints of the runs would not find space beside each other."""
    check_space(folder, sum(trainer.checkpoint_bytes for trainer in trainers), "the run with its checkpoints")
