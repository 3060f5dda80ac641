"""The commands of ``saekit``, one a file. Importing them makes a line of each of saekit's own warnings."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

from saekit.errors import SaekitWarning


def _show_warning(others: Callable[..., None], message: Warning, category: type[Warning], *where: Any) -> None:
    """Print saekit's own warnings as a line without the place in the code that they come from."""
    if issubclass(category, SaekitWarning):
        print(f"saekit: {message}", file=sys.stderr)
    else:
        others(message, category, *where)


warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)  # other packages' variants may warn now
