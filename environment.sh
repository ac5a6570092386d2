# Sourced: `source environment.sh EXTRAS` (hub or dev) enters this folder and sets $python to an environment that is ready.
#
# The first call makes .venv and installs the pinned packages; later calls look at a stamp and are done. A call that was
# cut off, at any point, is taken up by the next one. ENGINE_PYTHON=/path/to/python brings an environment of your own;
# nothing is installed then.

environment_fail() {  # NAME TEXT
  echo "ERROR E-ENVIRONMENT-$1 $2" >&2
  exit 4
}

# EXTRAS. A dev environment holds all that hub asks for. Importing pip finds a .venv whose base Python has gone or changed.
environment_ready() {
  [ -e ".venv/installed-dev-$environment_sum" ] || [ -e ".venv/installed-$1-$environment_sum" ] || return
  "$python" -c 'import pip' 2>/dev/null
}

environment_is_new_enough() {  # PYTHON
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# Locks file descriptor 9. The kernel lets go when this shell and its pip have ended, kill -9 included: no lock is ever stale.
environment_lock() {
  python3 -c '
import fcntl, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("Another launch is installing into .venv; waiting for it.", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError as error:
    print(f"This folder has no file locks ({error.strerror}): launch nothing else until the install is done.")' >&2
}

environment_install() {  # EXTRAS
  trap 'exit 130' INT  # else Ctrl-C would read as a failed install
  environment_is_new_enough python3 || environment_fail PYTHON \
    "python3: got $(python3 --version 2>/dev/null || echo none), expected 3.10 or later; install it or set ENGINE_PYTHON=/path/to/python"
  python3 -c 'import ensurepip, venv' 2>/dev/null || environment_fail PYTHON \
    "python3: its venv module is missing; install it (Debian, Ubuntu: the package python3-venv) or set ENGINE_PYTHON=/path/to/python"
  environment_lock
  if environment_ready "$1"; then return; fi  # the launch we waited for has done it

  echo "Installing PyTorch and the rest into .venv, once: 1 to 10 minutes, most of it PyTorch's download (GBs with CUDA)." >&2
  echo "You may stop it at any time; the next start continues." >&2
  if ! { environment_is_new_enough "$python" && "$python" -m pip install --help >/dev/null 2>&1; }; then
    python3 -m venv --clear .venv >&2 || environment_fail INSTALL "python3 -m venv .venv failed, see above; is the disk full?"
  fi
  rm -f .venv/installed-*
  # pip writes INSTALLER once a package's own files are all there. One without it was cut off, yet pip would take it for installed.
  for package in .venv/lib/python*/site-packages/*.dist-info; do
    [ -e "$package/INSTALLER" ] || rm -rf "$package"
  done
  "$python" -m pip install -c constraints.txt -e ".[$1]" >&2 || environment_fail INSTALL \
    "pip failed, see above; check network, disk and package index and start again, or set ENGINE_PYTHON=/path/to/python"
  if [ "$1" = dev ]; then  # for a tokenizer's file that tests read; what the package depends on would hold numpy back
    "$python" -m pip install -c constraints.txt --no-deps mistral-common >&2 || environment_fail INSTALL "pip failed on mistral-common, see above"
  fi
  touch ".venv/installed-$1-$environment_sum"
}

cd "$(dirname "${BASH_SOURCE[0]}")"
if [ -n "${ENGINE_PYTHON:-}" ]; then
  python=$ENGINE_PYTHON
  command -v "$python" >/dev/null || environment_fail PYTHON "ENGINE_PYTHON: got $python, expected a Python that can be run"
else
  python=$PWD/.venv/bin/python
  # The folder is in the sum because an editable install knows its path: a moved or copied tree installs again, in seconds.
  environment_sum=$({ pwd -P; cat setup.py constraints.txt; } | cksum | cut -d ' ' -f 1)
  if ! environment_ready "$1"; then
    [ -w . ] || environment_fail FOLDER "$PWD: cannot be written to, so .venv cannot be made; set ENGINE_PYTHON=/path/to/python"
    (environment_install "$1") 9>.venv.lock || exit $?
  fi
fi
