# Sourced by scripts/quickstart and scripts/test: .venv with condrl and what it needs, made or brought up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
if [ ! .venv/.condrl -nt pyproject.toml ]; then
    echo "Installing condrl and its packages into .venv (about 6 GB the first time)..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
    touch .venv/.condrl
fi
