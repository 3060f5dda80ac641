# Sourced by the other scripts: make .venv if there is none, bring it up to date, and activate it.
# saekit needs Python 3.10 or newer; set PYTHON to choose one.
if [ ! -x .venv/bin/python ]; then
    for candidate in "${PYTHON:-}" python3 python python3.13 python3.12 python3.11 python3.10; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            found=$candidate
            break
        fi
    done
    if [ -z "${found:-}" ]; then
        echo "saekit needs Python 3.10 or newer; set PYTHON to one" >&2
        exit 2
    fi
    echo "making .venv with $("$found" --version)"
    "$found" -m venv .venv
fi
# shellcheck disable=SC1091
source .venv/bin/activate
state=$(cat pyproject.toml scripts/constraints.txt "${BASH_SOURCE[0]}" | cksum; pwd)
if [ "$(cat .venv/installed 2>/dev/null)" != "$state" ]; then
    echo "installing saekit and what it needs (the first time takes minutes)"
    python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e '.[dev]'
    echo "$state" > .venv/installed
fi
