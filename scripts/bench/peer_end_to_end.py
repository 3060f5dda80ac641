"""Train a TopK dictionary with SAELens from text; run by ``end_to_end.py`` in SAELens's environment.

    python peer_end_to_end.py SETTINGS.json

Prints the seconds of the training, from the first text to the trained weights, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig, TopKTrainingSAEConfig


def main() -> None:
    """Train as the settings say."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    texts = [json.loads(line)["text"] for line in Path(asked["texts"]).read_text().splitlines()]
    config = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=asked["d_in"], d_sae=asked["width"], k=asked["k"]),
        model_name=asked["model"],
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": "float32"},
        hook_name=asked["module"],
        is_dataset_tokenized=False,
        context_size=asked["context_length"],
        training_tokens=asked["tokens"],
        train_batch_size_tokens=asked["batch_size"],
        n_batches_for_norm_estimate=1,
        lr=1e-3,
        device="cpu",
        autocast=asked["tuned"],
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        verbose=False,
    )
    runner = LanguageModelSAETrainingRunner(config, override_dataset=Dataset.from_list([{"text": t} for t in texts]))
    start = time.perf_counter()
    runner.run()
    print("RESULT", json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
