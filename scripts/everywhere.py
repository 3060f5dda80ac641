"""The tests that compute, as on other machines: with fewer of the processor's instructions, and with other threads.

``scripts/test --everywhere`` runs them with every set of instructions that the processor has, times 1, 2 and 4 threads;
``scripts/test --everywhere avx2:1 default:4 tests/core`` some combinations and some tests. All other arguments go to
pytest. A table of the combinations comes last; where one is red, the exit code is 1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch

TESTS = ("tests/core", "tests/trainers", "tests/evals", "tests/activations")
COMPUTE_NOTHING = (  # files, texts, names and the hub
    *("any_file", "card", "checkout", "config", "help", "hub", "loggers"),
    *("no_installs", "report_file", "seal", "tensor_files", "text"),
)
THREADS = (1, 2, 4)
# how torch, oneDNN and MKL are each told to use no more than some instructions; AVX-512 is all that there is
LIMITS = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "ALL", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
}


class Outcome(NamedTuple):
    """How the tests of one combination ended."""

    passed: int
    failed: int
    skipped: int
    seconds: float

    @property
    def green(self) -> bool:
        """Whether some passed and none failed."""
        return bool(self.passed and not self.failed)


def capabilities() -> list[str]:
    """The sets of instructions that this processor has, smallest first; not x86: what torch takes, and nothing else."""
    name = "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"
    free = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
    best = subprocess.run([sys.executable, "-c", name], env=free, capture_output=True, text=True, check=True).stdout
    known = list(LIMITS)
    return known[: known.index(best.strip()) + 1] if best.strip() in known else known[:1]


def run(capability: str, threads: int, arguments: list[str]) -> Outcome:
    """Run the tests in one combination."""
    limits = LIMITS[capability] | {"OMP_NUM_THREADS": str(threads)}
    limits["MKL_DYNAMIC"] = "FALSE"  # or it would take no more threads than there are cores, and torch no more than MKL
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
        code = subprocess.run(command, env=os.environ | limits).returncode
        if not report.exists():
            return Outcome(0, 1, 0, 0)
        suite = ElementTree.parse(report).getroot()[0].attrib
    tests, skipped = int(suite["tests"]), int(suite["skipped"])
    failed = int(suite["failures"]) + int(suite["errors"])
    passed = max(0, tests - failed - skipped)
    return Outcome(passed, failed or int(code != 0), skipped, float(suite["time"]))


def main(arguments: list[str]) -> int:
    """Run all combinations, or those that are named, and print the table."""
    has = capabilities()
    named = [word for word in arguments if re.fullmatch(r"[a-z]\w*:\d+", word)]
    if unknown := [word for word in named if word.split(":")[0] not in has]:
        print(f"this processor has {', '.join(has)}, so no {', '.join(unknown)}", file=sys.stderr)
        return 2
    combinations = named or [f"{capability}:{threads}" for capability in has for threads in THREADS]
    rest = [word for word in arguments if word not in named]
    if not any(word.startswith("tests") for word in rest):
        rest += [*TESTS, *(f"--ignore-glob=*/test_{name}.py" for name in COMPUTE_NOTHING)]
    outcomes = {}
    for each in combinations:
        print(f"\n{each} (torch {torch.__version__}, instructions:threads)", flush=True)
        capability, threads = each.split(":")
        outcomes[each] = run(capability, int(threads), rest)
    print(f"\n{'instructions':14}{'threads':>8}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for each, found in outcomes.items():
        capability, threads = each.split(":")
        row = f"{capability:14}{threads:>8}{found.passed:>8}{found.failed:>8}{found.skipped:>9}{found.seconds:>9.0f}"
        print(row + ("" if found.green else "  red"))
    passed, failed = (sum(getattr(each, name) for each in outcomes.values()) for name in ("passed", "failed"))
    print(f"{passed} passed, {failed} failed")
    return 0 if all(each.green for each in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
