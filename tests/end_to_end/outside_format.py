"""A format of another package, whole: one file of tensors, k among them, for dictionaries of topk."""

import torch

from saekit.formats import Contents, Format
from saekit.formats.tensor_files import read_tensors, write_safetensors
from saekit.sae_config import SAEConfig


class OneFile(Format):
    """What ``FORMATS`` and the entry point name is an instance of such a class."""

    weights = ("one_file.safetensors",)

    def read(self, file):
        tensors = read_tensors(file, file.parent)
        k = int(tensors.pop("k"))
        d_in, d_sae = tensors["W_enc"].shape
        return Contents(SAEConfig(d_in, d_sae, "topk", k), tensors, tensors["W_enc"].dtype)

    def unsupported(self, sae):
        return None if sae.cfg.architecture == "topk" else "thresholds"

    def files(self, sae):
        tensors = {name: value.cpu().contiguous() for name, value in sae.state_dict().items()}
        tensors["k"] = torch.tensor(sae.cfg.k)
        return {"one_file.safetensors": lambda part: write_safetensors(tensors, part)}


FORMAT = OneFile()
