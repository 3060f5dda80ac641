"""Make the dictionaries of tests/data: each by the package whose format it has, with what that package computes of it.

    python scripts/make_fixtures.py PACKAGE      # in an environment that has the package, pinned as below

Each is a folder of the package's own files and ``expected.safetensors``: activations x, features f, reconstructions
x_hat. The versions that the files in the repository come from:

    sae-lens 6.54.12, dictionary-learning 0.1.0, eai-sparsify 1.3.3; torch 2.13.0

OpenAI's code and Gemma Scope's are on no package index. Their files are made here as the published code writes them,
and what is expected is their published mathematics in float64 (``openai``, ``gemma_scope``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

DATA = Path(__file__).parents[1] / "tests/data"
D, F, K, N = 8, 32, 4, 12


def randomised(module: Any) -> Any:
    """The module with weights that make every part of the rule matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * (0.3 if value.ndim == 1 else 0.5))
            if name == "threshold":
                value.abs_()
        for name, value in module.named_buffers():
            if name == "threshold":
                value.fill_(0.4)
    return module


def activations() -> Tensor:
    """Tokens of different norms."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, D, generator=generator) * torch.linspace(0.5, 3, N)[:, None] + 0.5


def keep(folder: Path, x: Tensor, f: Tensor, x_hat: Tensor) -> None:
    """Write what is expected."""
    found = {"x": x, "f": f, "x_hat": x_hat}
    tensors = {name: value.detach().float().contiguous() for name, value in found.items()}
    save_file(tensors, folder / "expected.safetensors")
    (folder / "expected.safetensors").chmod(0o644)


def saelens() -> None:
    """SAELens: gated, TopK behind a layer norm, and BatchTopK as it is saved for inference."""
    from sae_lens import SAE
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    x = activations()
    batch = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K))
    batch.topk_threshold.fill_(0.6)
    for name, sae in {
        "batchtopk": batch,
        "gated": GatedSAE(GatedSAEConfig(d_in=D, d_sae=F)),
        "layer_norm": TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=K, normalize_activations="layer_norm")),
    }.items():
        folder = DATA / f"saelens_{name}"
        save = randomised(sae).save_inference_model if name == "batchtopk" else randomised(sae).save_model
        save(folder)
        again = SAE.load_from_disk(folder)
        f = again.encode(x)
        keep(folder, x, f, again.decode(f))


def dictionary_learning() -> None:
    """Each class of dictionary_learning that its own loader knows."""
    from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from dictionary_learning.utils import load_dictionary

    x = activations()
    for module in (
        AutoEncoder(D, F),
        AutoEncoderNew(D, F),
        GatedAutoEncoder(D, F),
        JumpReluAutoEncoder(D, F),
        AutoEncoderTopK(D, F, K),
        BatchTopKSAE(D, F, K),
        MatryoshkaBatchTopKSAE(D, F, K, [8, 24]),
    ):
        name = type(module).__name__
        folder = DATA / f"dictionary_learning_{name}"
        folder.mkdir(exist_ok=True)
        torch.save(randomised(module).state_dict(), folder / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": D, "dict_size": F, "k": K, "layer": 3}
        trainer |= {"lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_3"}
        config = {"trainer": trainer, "buffer": {"d_submodule": D, "io": "out", "ctx_len": 128}}
        (folder / "config.json").write_text(json.dumps(config, indent=4))
        again, _ = load_dictionary(str(folder), "cpu")
        f = again.encode(x)
        keep(folder, x, f, again.decode(f))


def sparsify() -> None:
    """Sparsify: the coder of one hook point, and the config of its run beside it."""
    from sparsify import SparseCoder, SparseCoderConfig

    x = activations()
    for run, config in {
        "sparsify": SparseCoderConfig(num_latents=F, k=K),
        "sparsify_expansion": SparseCoderConfig(expansion_factor=F // D, k=K),
    }.items():
        folder = DATA / run / ("layers.3" if run == "sparsify" else "layers.3.mlp")
        randomised(SparseCoder(D, config)).save_to_disk(folder)
        facts = {"model": "HuggingFaceTB/SmolLM2-135M", "dataset": "EleutherAI/SmolLM2-135M-10B", "ctx_len": 256}
        (folder.parent / "config.json").write_text(json.dumps(facts))
        again = SparseCoder.load_from_disk(folder)
        top = again.encode(x)
        f = torch.zeros(N, F).scatter(1, top.top_indices, top.top_acts)
        keep(folder, x, f, again.decode(top.top_acts, top.top_indices))
        (folder / "sae.safetensors").chmod(0o644)


def openai() -> None:
    """OpenAI: TopK behind a layer norm, and ReLU."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"pre_bias": [D], "encoder.weight": [F, D], "latent_bias": [F], "decoder.weight": [D, F]}
    state: dict[str, Any] = {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}
    state |= {"stats_last_nonzero": torch.zeros(F, dtype=torch.long), "latents_mean_square": torch.zeros(F)}
    state |= {"latents_activation_frequency": torch.ones(F)}
    facts = {"k": K, "postact_fn": "ReLU"}
    top_k = {"activation": "TopK", "activation_state_dict": facts, "activation.k": K, "activation.postact_fn": "ReLU"}
    for name, more in {"topk": top_k, "relu": {"activation": "ReLU", "activation_state_dict": {}}}.items():
        folder = DATA / f"openai_{name}/gpt2-small/resid_post_mlp_v5_32k/autoencoders"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({**state, **more}, folder / "6.pt")
        w = {key: value.double() for key, value in state.items()}
        x = activations().double()
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        x_in = (x - mean) / (std + 1e-5) if name == "topk" else x
        pre = (x_in - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
        kept = pre if name == "relu" else pre.where(pre >= pre.topk(K).values[:, -1:], 0)
        f = kept.clamp_min(0)
        x_hat = f @ w["decoder.weight"].T + w["pre_bias"]
        keep(folder.parents[2], x, f, x_hat * std + mean if name == "topk" else x_hat)


def gemma_scope() -> None:
    """Gemma Scope, the archive of numpy, and Gemma Scope 2, safetensors."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": [D, F], "b_enc": [F], "W_dec": [F, D], "b_dec": [D]}
    params = {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}
    params["threshold"] = torch.rand(F, generator=generator) + 0.2
    w = {name: value.double() for name, value in params.items()}
    x = activations().double()
    pre = x @ w["W_enc"] + w["b_enc"]
    f = pre.clamp_min(0) * (pre > w["threshold"])
    for name, place in {
        "gemma_scope": "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
        "gemma_scope_2": "gemma-scope-2-270m-pt/resid_post/layer_9_width_16k_l0_small",
    }.items():
        folder = DATA / name / place
        folder.mkdir(parents=True, exist_ok=True)
        if name == "gemma_scope":
            np.savez(folder / "params.npz", **{key: value.numpy() for key, value in params.items()})
        else:
            save_file({key.lower(): value for key, value in params.items()}, folder / "params.safetensors")
            (folder / "params.safetensors").chmod(0o644)
        keep(DATA / name, x, f, f @ w["W_dec"] + w["b_dec"])


MAKERS = {each.__name__: each for each in (saelens, dictionary_learning, sparsify, openai, gemma_scope)}

if __name__ == "__main__":
    for package in sys.argv[1:] or sys.exit(f"choose from {', '.join(MAKERS)}"):
        MAKERS[package]()
