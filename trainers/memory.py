"""How much memory runs need, and which of them fit at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from saekit.activations.mixing import BYTES
from saekit.kernels.devices import is_card
from saekit.trainers.config import TrainConfig
from saekit.trainers.variants import VARIANTS

_STATE = 16  # bytes a parameter: itself, its gradient, two moments of Adam
_WORK = 3  # copies of a batch's pre-activations that a step holds, in buffers that runs share
_FILLS = 3  # of a stream: one is taken, one is ready, one is being made
_SHARE = 0.8  # of what is free; the rest is for what is not counted
_MAIN = torch.device("cpu")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """Bytes that runs on one stream take beside the model.

    Attributes:
        training: weights, gradients, moments, and the buffers of a step, on the device that trains.
        rows: of the streams, and the pool of contexts, in main memory.
    """

    training: int
    rows: int

    @classmethod
    def of(cls, configs: Sequence[TrainConfig], d_in: Sequence[int]) -> Memory:
        """What these runs need, each with its d_in."""
        streams: dict[tuple[int, ...], dict[str | None, int]] = {}
        for config, d in zip(configs, d_in, strict=True):
            doubled = VARIANTS[config.variant].needs_gradients(config)
            streams.setdefault(config.order, {})[config.hook] = 2 * d if doubled else d
        rows = sum(
            4 * _FILLS * max(min(buffer, tokens), size) * sum(hooks.values())
            for (_, size, buffer, tokens), hooks in streams.items()
        )
        pool = max(
            (BYTES * (config.source.pooled(config.tokens).pool or 0) for config in configs if config.cache is None),
            default=0,
        )
        widths = [config.width_at(d) for config, d in zip(configs, d_in, strict=True)]
        state = sum(_STATE * (2 * d * width + d + width) for d, width in zip(d_in, widths, strict=True))
        work = max(4 * _WORK * config.batch_size * width for config, width in zip(configs, widths, strict=True))
        return cls(state + work, rows + pool)

    @property
    def total(self) -> int:
        """All of it."""
        return self.training + self.rows

    def fits(self, device: torch.device) -> bool:
        """Whether four fifths of what is free on the device, and in main memory, are enough."""
        if is_card(device):
            return self.training <= _SHARE * free_bytes(device) and self.rows <= _SHARE * free_bytes(_MAIN)
        return self.total <= _SHARE * free_bytes(_MAIN)


def groups_that_fit(
    configs: Sequence[TrainConfig], d_in: Sequence[int], device: torch.device
) -> list[tuple[list[int], Memory]]:
    """The numbers of the runs, in their order, in groups that memory holds; a run too large stands alone."""
    groups: list[tuple[list[int], Memory]] = []
    for number in range(len(configs)):
        members = [*groups[-1][0], number] if groups else [number]
        together = Memory.of([configs[m] for m in members], [d_in[m] for m in members])
        if groups and together.fits(device):
            groups[-1] = (members, together)
        else:
            groups.append(([number], Memory.of([configs[number]], [d_in[number]])))
    return groups


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a CUDA device, or in main memory as far as a job's share of the machine goes."""
    if is_card(device):
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # type: ignore[import-untyped]

    free = int(psutil.virtual_memory().available)
    try:
        limit, taken = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if limit == "max" else min(free, int(limit) - int(taken))
    except (OSError, ValueError):
        return free
