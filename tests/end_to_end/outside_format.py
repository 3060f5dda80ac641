"""A format of another package, whole: columns of numbers in one archive of numpy, for dictionaries of topk."""

from pathlib import Path

import numpy as np

from saekit.formats import Contents, Format
from saekit.formats.tensor_files import read_tensors
from saekit.sae_config import SAEConfig


class Columns(Format):
    weights = ("columns.npz",)

    def read(self, file: Path) -> Contents:
        tensors = read_tensors(file, file.parent)
        k = int(tensors.pop("k"))
        d_in, d_sae = tensors["W_enc"].shape
        return Contents(SAEConfig(d_in, d_sae, "topk", k), tensors, tensors["W_enc"].dtype)

    def unsupported(self, sae):
        return None if sae.cfg.architecture == "topk" else "thresholds"

    def files(self, sae):
        arrays = {name: value.detach().cpu().numpy() for name, value in sae.state_dict().items()}
        return {"columns.npz": lambda part: np.savez(part.open("wb"), k=sae.cfg.k, **arrays)}


FORMAT = Columns()
