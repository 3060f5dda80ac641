"""Model cards: what a reader of the hub should know of a dictionary, from its own files and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from saekit.activations.mixture import described, weighted_in
from saekit.errors import SaekitError
from saekit.evals.registry import evaluations
from saekit.evals.report import figures, groups_in, lookup, notes, over_documents
from saekit.formats.registry import FORMATS, files_of
from saekit.hub import HubPath
from saekit.loading import load
from saekit.reading import read_json
from saekit.sae import SparseAutoencoder

_LONGEST = 200  # characters of a text from a file
_HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_OURS = {
    "embedded": "the language model that ships with saekit",
    "python": "the Python source on the machine it was trained on",
}
_RULES = {
    "topk": "the {k} largest pre-activations of each token, where positive",
    "jumprelu": "pre-activations above a threshold of each feature",
    "standard": "positive pre-activations",
    "token_norm": "pre-activations, over the token's ‖x − b_dec‖, above a threshold of each feature",
}
_NORMALISED = {"layer_norm": "each token's layer norm, which the reconstruction undoes"}


def card(folder: str | Path, hub_path: HubPath | None = None, *, above: bool = False) -> str:
    """The model card of a dictionary as Markdown with a YAML head, for ``README.md``.

    Texts from its files stand in the card as code, on one line and cut at 200 characters; the head takes nothing from
    them but names that the hub could have given.

    Args:
        folder: the dictionary's or its run's, whose ``eval.json`` gives the figures.
        hub_path: where it will be on the hub, for the lines that load it; the folder itself if not given.
        above: the card of the repository's root, for a dictionary that lies deeper: it points there.

    Raises:
        SaekitError: the folder holds no dictionary, or its report is damaged or of another one.
    """
    sae = load(folder)
    files = files_of(Path(folder))
    told = _Told(sae)
    readable = "sae_weights.safetensors" in files and FORMATS["saelens"].unsupported(sae) is None
    head = told.head(["sparse-autoencoder", "interpretability", *(["saelens"] if readable else [])])
    if above:
        assert hub_path is not None
        inside = f"- [{_code(hub_path.path)}]({quote(hub_path.path)}): {told.title()}"
        return f"{head}\n# Sparse autoencoders\n\n{inside}\n\n{_loading(hub_path)}"
    parts = [f"{head}\n# {told.title()}", told.facts(), _figures(sae, files), _loading(hub_path or folder)]
    parts += [_in_saelens(hub_path) if readable else _unreadable(sae, hub_path), told.missing()]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


class _Told:
    """What a dictionary's metadata tells, as far as it is of the right kind."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.cfg = sae.cfg
        own, metadata = sae.cfg.metadata.get("saekit"), sae.cfg.metadata
        self.own: dict[str, Any] = own if isinstance(own, dict) else {}
        texts = {"model": "model_name", "hook": "hook_name", "dataset": "dataset_path"}
        self.texts = {fact: _text(metadata.get(key)) for fact, key in texts.items()}
        self.context = _count(metadata.get("context_size"))
        self.tokens = _count(self.own.get("training_tokens"))

    def title(self) -> str:
        model, hook = self.texts["model"], self.texts["hook"]
        of = f" of {_code(_own_name(model))}" if model else ""
        return f"Sparse autoencoder{of}" + (f" at {_code(hook)}" if hook else "")

    def head(self, tags: list[str]) -> str:
        """The YAML that the hub reads."""
        from huggingface_hub import ModelCardData

        public = {fact: name for fact, name in self.texts.items() if name and _on_the_hub(name)}
        datasets = [name for name in self._datasets() if _on_the_hub(name)] or None
        facts = ModelCardData(library_name="saekit", tags=tags, base_model=public.get("model"), datasets=datasets)
        return f"---\n{facts.to_yaml()}\n---\n"

    def _datasets(self) -> list[str]:
        """The dataset it was trained on, or those of the mix."""
        name = self.texts["dataset"]
        return [text for text, _ in weighted_in(name or "")] or ([name] if name else [])

    def facts(self) -> str:
        """What the dictionary is and where it comes from."""
        cfg, own = self.cfg, self.own
        rule = _RULES[cfg.affinity_scale if cfg.affinity_scale != "none" else cfg.architecture].format(k=cfg.k)
        text = _mix_described(self.texts["dataset"])
        rows = {
            "model": _described(self.texts["model"]),
            "hook point": _code(self.texts["hook"]) if self.texts["hook"] else None,
            "features": f"{cfg.d_sae:,}, of activations of width {cfg.d_in:,}",
            "input": _NORMALISED.get(cfg.input_normalization),
            "active are": rule,
            "trained on": " of ".join(filter(None, [f"{self.tokens:,} tokens" if self.tokens else None, text])),
            "token ids": self._column("tokens_column"),
            "conversations": self._column("messages_column"),
            "messages trained on": self._role(),
            "text divided by": self._column("group_column"),
            "context": f"{self.context:,} tokens" if self.context else None,
            "trained by": self._training(),
            "started from": self._initial(),
        }
        if isinstance(own.get("seed"), int):
            rows["seed"] = str(own["seed"])
        return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)

    def _column(self, fact: str) -> str | None:
        """A column of the text that the provenance names."""
        provenance = self.own.get("provenance")
        name = _text(provenance.get(fact)) if isinstance(provenance, dict) else None
        return f"the column {_code(name)}" if name else None

    def _role(self) -> str | None:
        """Whose messages count in conversations."""
        provenance = self.own.get("provenance")
        role = (
            provenance.get("train_on") if isinstance(provenance, dict) and provenance.get("messages_column") else None
        )
        return (
            None
            if role is None
            else "all, and what the template writes"
            if role == "all"
            else f"those of {_code(_text(role))}"
        )

    def _initial(self) -> str | None:
        """The dictionary that the training started from."""
        initial = self.own.get("init")
        path = _text(initial.get("path")) if isinstance(initial, dict) else None
        return _described(path) if path else None

    def _training(self) -> str | None:
        variant, aux = _text(self.own.get("variant")), _text(self.own.get("aux"))
        if not variant:
            return None
        k = _count(self.own.get("k"))
        return (
            _code(variant)
            + (f" with k = {k}" if k else "")
            + (f" and {_code(aux)}" if aux not in (None, "none") else "")
        )

    def missing(self) -> str:
        """What a reader would want to know and the files do not say."""
        known: dict[str, object] = {"the model": self.texts["model"], "the hook point": self.texts["hook"]}
        known |= {"the text it was trained on": self.texts["dataset"], "how many tokens it was trained on": self.tokens}
        lacking = [name for name, value in known.items() if not value]
        return "## Not known\n\nIts files do not say: " + "; ".join([*lacking, "a licence"]) + "."


def _figures(sae: SparseAutoencoder, files: dict[str, Path]) -> str:
    """The report's figures as a table, or that there are none."""
    if "eval.json" not in files:
        return "## Figures\n\nIt comes without an evaluation; `saekit eval` makes one."
    report = groups_in(files["eval.json"])
    about, groups = (
        report["about"],
        {name: report[name] for name, each in evaluations() if each.on_card and name in report},
    )
    for key in ("d_in", "d_sae"):
        if about.get(key, getattr(sae.cfg, key)) != getattr(sae.cfg, key):
            raise SaekitError(f"'{files['eval.json']}' is of another dictionary: it has another {key}; move it away")
    shown = figures(groups)
    tokens = _count(lookup(groups, "sparsity.tokens"))
    if tokens is None:
        raise SaekitError(f"'{files['eval.json']}' is no report of an evaluation; move it away")
    columns = ["figure", "value", "±", "meaning"]
    rows = [[figure.title, figure.value, figure.error, figure.meaning] for figure in shown]
    rows = [columns, ["---:" if name in ("value", "±") else "---" for name in columns], *rows]
    if not any(figure.error for figure in shown):
        rows = [[title, value, meaning] for title, value, _, meaning in rows]
    lines = [f"|{'|'.join(row)}|" if row[0] == "---" else f"| {' | '.join(row)} |" for row in rows]
    lines += [line for note in over_documents(groups) for line in ("", f"{note[0].upper()}{note[1:]}.")]
    origin = _mix_described(_text(about.get("dataset")) or _text(about.get("cache")))
    held_out = "held-out " if about.get("part") == "heldout" else ""
    told = f"On {tokens:,} {held_out}tokens{f' of {origin}' if origin else ''}, by the rule above:"
    why = [f"\n{_code(_text(note))}" for note in notes(about)]
    return "\n".join(["## Figures", "", told, "", *lines, *why])


def _loading(hub_path: HubPath | str | Path) -> str:
    return f"## Use\n\n```python\nimport saekit\n\nsae = saekit.load({_string(hub_path)})\n```"


def _in_saelens(hub_path: HubPath | None) -> str:
    """How SAELens loads it."""
    if hub_path is None:
        return "SAELens opens its folder by `SAE.load_from_disk`."
    if hub_path.path and hub_path.revision is None:
        lines = ["", f"sae = SAE.from_pretrained({_string(hub_path.repo)}, {_string(hub_path.path)})"]
    else:  # what it loads by name lies deeper, on the branch main
        revision = f", revision={_string(hub_path.revision)}" if hub_path.revision else ""
        inside = " + " + _string("/" + hub_path.path) if hub_path.path else ""
        lines = ["from huggingface_hub import snapshot_download", ""]
        lines += [f"sae = SAE.load_from_disk(snapshot_download({_string(hub_path.repo)}{revision}){inside})"]
    return "\n".join(["In SAELens:", "", "```python", "from sae_lens import SAE", *lines, "```"])


def _unreadable(sae: SparseAutoencoder, hub_path: HubPath | None) -> str:
    """Why SAELens cannot load it as it is."""
    made = f"`saekit convert {hub_path or 'FOLDER'} TARGET"
    if sae.cfg.affinity_scale == "none":
        return f"SAELens reads what {made}` makes of it."
    return (
        "Its thresholds follow each token's norm, which SAELens cannot read; the nearest plain ones, with what they "
        f"cost: {made} --lossy`."
    )


def _text(value: Any) -> str | None:
    """A text of others on one line, or None where it is none."""
    if not isinstance(value, str):
        return None
    return " ".join("".join(c if c.isprintable() else " " for c in value[: 4 * _LONGEST]).split())[:_LONGEST] or None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < 2**63 else None


def _code(text: str | None) -> str:
    """A text of others as code, which ends neither the code nor a table's cell."""
    return "`" + (text or "").replace("`", "'").replace("|", "¦") + "`"


def _described(name: str | None) -> str | None:
    """A model or a text, and whether it is one of a machine."""
    if name is None:
        return None
    if name in _OURS:
        return _OURS[name]
    kind = " (a GGUF file)" if name.endswith(".gguf") else " (a local one)"
    return _code(_own_name(name)) + ("" if _on_the_hub(name) else kind)


def _mix_described(name: str | None) -> str | None:
    """A text, or those of a mix and their weights."""
    texts = weighted_in(name or "")
    return " and ".join(f"{_described(text)} ({part:.0%})" for text, part in texts) if texts else _described(name)


def _own_name(name: str) -> str:
    """A name of the hub as it is, and the last part of a path."""
    return name if _on_the_hub(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _on_the_hub(name: str) -> bool:
    """Whether a name can be that of a whole repository of the hub, and is none of this machine."""
    known = name in _OURS or name.endswith(".gguf") or Path(name).exists()
    return bool(_HUB_NAME.fullmatch(name)) and not known


def _string(text: object) -> str:
    """A text as Python writes it."""
    return json.dumps(str(text), ensure_ascii=False)


def published(file: Path) -> str | bytes:
    """A file as others may see it: its path or, where it is JSON that names places of this machine, a text without."""
    if file.suffix != ".json":
        return str(file)
    before = read_json(file, 1 << 24)
    after = _without_places(before)
    return str(file) if after == before else json.dumps(after, indent=2).encode() + b"\n"


def _without_places(value: Any) -> Any:
    """The same, with the last part alone of every text that is an absolute path."""
    if isinstance(value, dict):
        return {key: _without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    if not isinstance(value, str):
        return value
    if texts := weighted_in(value):
        return described((_without_places(name), part) for name, part in texts)
    return Path(value).name if Path(value).is_absolute() or value.startswith("~") else value
