"""One trainer, in an environment of its own, that takes a step whenever its standard input says so.

    python peer_step.py PACKAGE MODE SHAPE    (A, B, or d,F,k,n)

MODE is ``default`` or ``tuned`` (bfloat16 autocast; reused memory is set in the environment by the caller) and, for
saekit, a precision. Each line of input asks for one step; each line of output gives its seconds. At the end of the
input comes the peak of the memory held, in bytes. Each trainer does what its own loop does with a batch at hand.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import Shape, activations, shape_of

Step = Callable[[Tensor], object]
STEPS = 10_000  # that the schedules are told of


def autocast(mode: str) -> AbstractContextManager[object]:
    """bfloat16 where the mode is ``tuned``."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if mode == "tuned" else nullcontext()


def saekit(mode: str, shape: Shape, batches: list[Tensor]) -> Step:
    """Ours; the mode is the precision."""
    from step import Bench

    bench = Bench(shape, batches, "topk", mode)
    return lambda x: bench.step()


def sparsify(mode: str, shape: Shape, batches: list[Tensor]) -> Step:
    """The body of its trainer's loop, with its default optimiser, which keeps less state than Adam."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    sae = SparseCoder(shape.d, SparseCoderConfig(num_latents=shape.F, k=shape.k), dtype=torch.float32)
    sae.b_dec.data = batches[0].mean(0)
    optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=5e-3 / (shape.F / 2**14) ** 0.5), momentum=0.95)
    optimizer.train()
    since_fired = torch.zeros(shape.F, dtype=torch.long)

    def step(x: Tensor) -> None:
        fired = torch.zeros(shape.F, dtype=torch.bool)
        sae.set_decoder_norm_to_unit_norm()
        with autocast(mode):
            variance = (x - x.mean(0)).pow(2).sum()
            out = sae(x, total_variance=variance)
        fired[out.latent_indices.flatten()] = True
        float(out.fvu)
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since_fired.add_(len(x))[fired] = 0

    return step


def dictionary_learning(mode: str, shape: Shape, batches: list[Tensor]) -> Step:
    """Its TopK trainer."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(STEPS, shape.d, shape.F, shape.k, layer=0, lm_name="none", seed=0, device="cpu")
    count = iter(range(STEPS))

    def step(x: Tensor) -> None:
        with autocast(mode):
            trainer.update(next(count), x)

    return step


def sae_lens(mode: str, shape: Shape, batches: list[Tensor]) -> Step:
    """Its trainer's step."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=shape.d, d_sae=shape.F, k=shape.k))
    config = SAETrainerConfig(
        total_training_samples=STEPS * shape.n, train_batch_size_samples=shape.n, autocast=mode == "tuned", lr_end=3e-5
    )
    return SAETrainer(config, sae, iter(()), None).step


def overcomplete(mode: str, shape: Shape, batches: list[Tensor]) -> Step:
    """The body of its ``train_sae``, by calling it on one batch; Adam, since it leaves the choice to its caller."""
    for name in ("timm", "torchvision", "torchvision.transforms"):  # for its vision models; no CPU build fits
        sys.modules.setdefault(name, mock.MagicMock())
    from overcomplete.sae import TopKSAE, train_sae

    sae = TopKSAE(shape.d, shape.F, top_k=shape.k)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-4)

    def criterion(x: Tensor, x_hat: Tensor, *_: Tensor) -> Tensor:
        return (x - x_hat).square().mean()

    def step(x: Tensor) -> None:
        with autocast(mode):
            train_sae(sae, [x], criterion, optimizer, nb_epochs=1, monitoring=0)

    return step


PACKAGES: dict[str, Callable[[str, Shape, list[Tensor]], Step]] = {
    "saekit": saekit,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "sae_lens": sae_lens,
    "overcomplete": overcomplete,
}


def main() -> None:
    """Answer the lines of the standard input."""
    package, mode, shape = sys.argv[1], sys.argv[2], shape_of(sys.argv[3])
    real, sys.stdout = sys.stdout, sys.stderr  # for whatever the package prints
    batches = activations(shape)
    step = PACKAGES[package](mode, shape, batches)
    for number, _ in enumerate(sys.stdin):
        start = time.perf_counter()
        step(batches[number % len(batches)])
        print(time.perf_counter() - start, file=real, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=real, flush=True)


if __name__ == "__main__":
    main()
