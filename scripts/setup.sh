# Sourced by the other scripts: makes or reuses .venv in the project's root and installs what $1 names.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Python 3.11 or newer is needed; found $("$python" --version). Set PYTHON to another one." >&2
  exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
# Installed again only when what is installed differs from what is asked for.
stamp=".venv/ticktune-$1"
wanted="$(cat pyproject.toml constraints.txt | cksum)"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  echo "Installing into .venv (a few minutes the first time) ..." >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$1]"
  echo "$wanted" > "$stamp"
fi
PATH="$PWD/.venv/bin:$PATH"
export PATH
