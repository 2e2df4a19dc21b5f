#!/bin/sh
# Prints the first Python from 3.11 on that can make a virtual environment.
# The variable PYTHON is tried before the usual names.
check='import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'

for python in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3.14 python3 python; do
  if "$python" -c "$check" 2>/dev/null; then
    echo "$python"
    exit 0
  fi
  if [ "$python" = "${PYTHON:-}" ]; then
    echo "PYTHON=$PYTHON cannot be used: it is missing, older than 3.11, or without venv." >&2
    echo "The usual names are tried." >&2
  fi
done
cat >&2 <<'END'
No Python from 3.11 on that can make a virtual environment was found. Install one, for example:
  apt install python3 python3-venv   # Debian 12, Ubuntu 24.04 or newer
  brew install python                # macOS
or name one: make PYTHON=/path/to/python3 ...
END
exit 1
