"""Judge dictionaries by SAEBench's core evaluation, by SAELens' own and by saekit's, on the same held-out contexts.

    python scripts/saebench.py runs/quickstart runs/topk --page docs/saebench.md

Runs in an environment with SAEBench (docs/saebench.md says how to make one). A fourth column has SAEBench's
definitions, computed in float64 from saekit's activations: where it agrees with SAEBench's figure and saekit's does
not, the definitions differ and nothing else.
"""

from __future__ import annotations

import argparse
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import calculate_misc_metrics, run_evals
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from sae_lens import evals as saelens
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from studies import MarkedPage, told
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import OFFICIAL_MODEL_NAMES

import saekit
from saekit.activations import ActivationSource, ContextBatch, harvest
from saekit.errors import SaekitError
from saekit.evals import Evaluator, evaluate, heldout_contexts
from saekit.evals.downstream import edited_logits
from saekit.evals.report import to_json
from saekit.evals.saebench import for_saebench
from saekit.files import replace_file
from saekit.sae import SparseAutoencoder

BATCH = 16  # contexts, SAEBench's default
SPECIAL = "ce_loss_with_sae, special tokens replaced too"
BEGIN = "<!-- figures: scripts/saebench.py -->"
EVERYTHING = dict.fromkeys(
    ("compute_kl", "compute_ce_loss", "compute_l2_norms", "compute_sparsity_metrics", "compute_variance_metrics",
     "compute_featurewise_density_statistics", "compute_featurewise_weight_based_metrics"), True,
)  # fmt: skip
# SAEBench's name → where saekit's report has it
OURS = {
    "l0": ("sparsity", "l0"),
    "cossim": ("reconstruction", "cosine"),
    "l2_ratio": ("reconstruction", "norm_ratio"),
    "explained_variance": ("reconstruction", "explained_variance"),
    "mse": ("reconstruction", "mse"),
    "ce_loss_without_sae": ("downstream", "ce_clean"),
    "ce_loss_with_sae": ("downstream", "ce_reconstructed"),
    "ce_loss_with_ablation": ("downstream", "ce_zero"),
    "ce_loss_score": ("downstream", "recovered_share"),
    "kl_div_with_sae": ("downstream", "kl"),
}
ROWS = (
    "l0", "frac_alive", "cossim", "l2_ratio", "ce_loss_without_sae", "ce_loss_with_sae", SPECIAL,
    "ce_loss_with_ablation", "ce_loss_score", "kl_div_with_sae", "kl_div_with_ablation", "explained_variance",
    "explained_variance_legacy", "mse", "relative_reconstruction_bias", "l1",
)  # fmt: skip


def main() -> None:
    """Read the command line and judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("dictionaries", nargs="+", help="dictionaries, or runs, that name their model and text")
    parser.add_argument("--tokens", type=int, default=32_768, help="held-out tokens, about")
    parser.add_argument("--json", type=Path, help="file that receives the figures")
    parser.add_argument("--page", type=Path, help="page that receives the tables")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    found = {path: evaluated(path, arguments.tokens) for path in arguments.dictionaries}
    sizes = {
        f"{about['tokens']:,} tokens in {about['contexts']:,} contexts"
        for about in (columns["about"] for columns in found.values())
    }
    text = f"{versions()}\n{'; '.join(sizes)}.\n\n{table(found)}"
    print(text)
    if arguments.json:
        replace_file(arguments.json, lambda path: path.write_text(to_json(found)))
    if arguments.page:
        MarkedPage(arguments.page, BEGIN, "SAEBench").write(text)


def evaluated(path: str, tokens: int) -> dict[str, dict[str, float]]:
    """The figures of one dictionary, by evaluator and by SAEBench's name; and over how many tokens."""
    sae = saekit.load(path)
    source = Evaluator().source_of(sae, path)
    sae = for_saebench(sae)
    model = hooked_transformer(sae.cfg.metadata["model_name"])
    load_and_format_sae("saekit", sae, "cpu")
    special = {getattr(model.tokenizer, f"{kind}_token_id") for kind in ("pad", "eos", "bos")} - {None}
    contexts = whole_batches(heldout_contexts(source, tokens), special)
    with torch.no_grad():
        return {
            "SAEBench": by_saebench(sae, model, contexts, special),
            "SAELens": by_saelens(sae, model, contexts, special),
            "saekit": by_saekit(sae, source, contexts),
            "definition": by_definition(sae, source, contexts),
            "about": {"tokens": int(contexts.kept.sum()), "contexts": len(contexts.tokens)},
        }


def hooked_transformer(name: str) -> HookedTransformer:
    """The model as SAEBench loads it. TransformerLens takes a folder for a model once it is among its names."""
    if Path(name).is_dir() and name not in OFFICIAL_MODEL_NAMES:
        OFFICIAL_MODEL_NAMES.append(name)
    return HookedTransformer.from_pretrained_no_processing(name, device="cpu", dtype=torch.float32)


def whole_batches(contexts: ContextBatch, special: set[int]) -> ContextBatch:
    """As many contexts as fill batches.

    Raises:
        SaekitError: special tokens stand in the text: SAEBench, which knows them by their ids, would leave out others
            than saekit does.
    """
    contexts = contexts.rows(0, len(contexts.tokens) // BATCH * BATCH)
    if not len(contexts.tokens):
        raise SaekitError(f"--tokens does not fill a batch of {BATCH} contexts")
    if (torch.isin(contexts.tokens, torch.tensor(sorted(special))) == contexts.kept).any():
        raise SaekitError("the text has special tokens of its own")
    return contexts


def store_of(sae: SparseAutoencoder, model: HookedTransformer, contexts: ContextBatch) -> ActivationsStore:
    """The contexts in order, as SAEBench takes text; after the last comes the first again."""
    dataset = Dataset.from_dict({"tokens": contexts.tokens.tolist()})
    return ActivationsStore.from_sae(model, sae, dataset, context_size=contexts.tokens.shape[1])


def by_saebench(
    sae: SparseAutoencoder, model: HookedTransformer, contexts: ContextBatch, special: set[int]
) -> dict[str, float]:
    """SAEBench's core evaluation."""
    batches = len(contexts.tokens) // BATCH
    sizes = {
        "batch_size_prompts": BATCH,
        "n_eval_reconstruction_batches": batches,
        "n_eval_sparsity_variance_batches": batches,
    }
    config = CoreEvalConfig(**sizes, **EVERYTHING, exclude_special_tokens_from_reconstruction=True)
    groups, features = run_evals(sae, store_of(sae, model, contexts), model, config, ignore_tokens=special)
    config = CoreEvalConfig(**sizes, compute_ce_loss=True)  # special tokens are replaced too: its default
    default, _ = run_evals(sae, store_of(sae, model, contexts), model, config, ignore_tokens=special)
    return flat(groups) | {
        "frac_alive": calculate_misc_metrics(features)["frac_alive"],
        SPECIAL: flat(default)["ce_loss_with_sae"],
    }


def by_saelens(
    sae: SparseAutoencoder, model: HookedTransformer, contexts: ContextBatch, special: set[int]
) -> dict[str, float]:
    """SAELens' own evaluation."""
    batches = len(contexts.tokens) // BATCH
    config = saelens.EvalConfig(
        batch_size_prompts=BATCH,
        n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches,
        **EVERYTHING,
    )
    store = store_of(sae, model, contexts)
    groups, features = saelens.run_evals(sae, store, model, ActivationScaler(), config, exclude_special_tokens=special)
    density = torch.tensor(features["feature_density"])
    return flat(groups) | {"frac_alive": float((density > 0).double().mean())}


def flat(groups: dict[str, dict[str, float]]) -> dict[str, float]:
    """Figures by name alone."""
    return {name: value for figures in groups.values() for name, value in figures.items()}


def by_saekit(sae: SparseAutoencoder, source: ActivationSource, contexts: ContextBatch) -> dict[str, float]:
    """saekit's evaluation, under SAEBench's names."""
    report = evaluate(sae, source.model, contexts, hook=source.hook, batch=BATCH)
    found = {name: float(report[group][key]) for name, (group, key) in OURS.items()}
    return found | {"frac_alive": 1 - float(report["sparsity"]["dead_share"])}


def by_definition(sae: SparseAutoencoder, source: ActivationSource, contexts: ContextBatch) -> dict[str, float]:
    """SAEBench's definitions, in float64 from what saekit sees at the same positions."""
    tokens: dict[str, list[Tensor]] = {}  # one figure a token
    batches: dict[str, list[Tensor]] = {}  # one a batch
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)

    def note(into: dict[str, list[Tensor]], **values: Tensor) -> None:
        for name, value in values.items():
            into.setdefault(name, []).append(value.double().reshape(-1))

    for part in contexts.split(BATCH):
        (found,) = harvest(source.model, source.hook, [part])
        code = sae.encode_sparse(found.x)
        fired[code.features] = True
        x, x_hat = found.x.double(), sae.decode(code).double()
        error, norm, norm_hat = (x - x_hat).square().sum(1), x.norm(dim=1), x_hat.norm(dim=1)
        note(
            tokens,
            l0=code.matches_per_token(),
            l1=code.to_dense().double().sum(1),
            l2_norm_in=norm,
            l2_norm_out=norm_hat,
            l2_ratio=norm_hat / norm,
            cossim=(x * x_hat).sum(1) / (norm * norm_hat),
            mse=error / len(x),
            explained_variance_legacy=1 - error / (x - x.mean(0)).square().sum(1),
        )
        note(
            batches,
            error=error.mean(),
            squares=x.square().sum(1).mean(),
            square=x.square().mean(),
            relative_reconstruction_bias=x_hat.square().sum(1).mean() / (x * x_hat).sum(1).mean(),
        )
        everywhere = part._replace(kept=torch.ones_like(part.kept))
        edits = {
            "without_sae": (part, None),
            "with_sae": (part, sae),
            "with_ablation": (everywhere, torch.zeros_like),
            "special": (everywhere, sae),
        }
        clean, scored = None, part.kept[:, :-1]
        for name, (where, edit) in edits.items():
            logits = edited_logits(source.model, source.hook, where, edit)
            log_p = logits[:, :-1][scored].double().log_softmax(-1)
            note(tokens, **{f"ce_loss_{name}": -log_p.gather(1, part.tokens[:, 1:][scored][:, None])})
            log_p = logits[part.kept].double().log_softmax(-1)
            clean = log_p if clean is None else clean
            note(tokens, **{f"kl_div_{name}": (clean.exp() * (clean - log_p)).sum(1)})
    figures = {name: float(torch.cat(values).mean()) for name, values in {**tokens, **batches}.items()}
    ce, kl = ({name: figures[f"{kind}_{name}"] for name in edits} for kind in ("ce_loss", "kl_div"))
    return figures | {
        SPECIAL: ce["special"],
        "frac_alive": float(fired.double().mean()),
        "explained_variance": 1 - figures["error"] / (figures["squares"] - figures["square"] ** 2),
        "ce_loss_score": (ce["with_ablation"] - ce["with_sae"]) / (ce["with_ablation"] - ce["without_sae"]),
        "kl_div_score": 1 - kl["with_sae"] / kl["with_ablation"],
    }


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: a row a figure, columns by dictionary and evaluator."""
    head, lines = ["figure"], [[row] for row in ROWS]
    for path, columns in found.items():
        for evaluator, figures in columns.items():
            if evaluator != "about":
                head.append(f"{path} {evaluator}" if evaluator == "SAEBench" else evaluator)
                for line in lines:
                    value = figures.get(line[0])
                    line.append("" if value is None else f"{value:.6g}")
    rows = [head, ["---", *["--:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def versions() -> str:
    """What the figures were taken with."""
    names = ("saekit", "sae-bench", "sae-lens", "transformer-lens", "torch")
    return "Versions: " + ", ".join(f"{name} {version(name)}" for name in names) + "."


if __name__ == "__main__":
    with told("saebench"):
        main()
