"""What ``saekit eval --suite dark_matter`` may be told."""

from __future__ import annotations

from pathlib import Path

from saekit.settings import Settings, setting


class DarkMatterSettings(Settings):
    """Which parts of the errors to look at."""

    earlier: list[str] = setting(
        default_factory=list,
        description="dark_matter: a dictionary of an earlier part, to predict the errors from; may be given again",
    )
    pursuit: bool = setting(False, description="dark_matter: also with features chosen by gradient pursuit")
    ce_tokens: int = setting(65_536, ge=0, description="dark_matter: about so many tokens to splice; 0 for none")
    figures: Path | None = setting(None, description="dark_matter: folder that receives figures")
