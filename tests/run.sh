#!/usr/bin/env bash
# Runs the tests but for those marked `faults`: ./tests/run.sh [pytest arguments], for instance `-k resume` or `-x`.
# ./tests/run.sh --faults [pytest arguments] runs those that take minutes: the long halves of the fault tests.
# ./tests/run.sh --all [pytest arguments] runs both.
# ./tests/run.sh --cuda [pytest arguments] runs those that need a GPU; from all others it is hidden.
# ./tests/run.sh --mutations [words] plants the bugs of tests/mutations.py one by one.
set -euo pipefail
cd "$(dirname "$0")/.."
source ./environment.sh dev
export OMP_NUM_THREADS=1  # tests start up to four ranks on two cores, and bit equality needs one thread count throughout
workers="-n 2 --dist loadfile"  # of pytest-xdist, for many tests wait most of their time; -n 0: all in one process
case "${1:-}" in
  --faults) workers="" && set -- -m faults "${@:2}" ;;  # some measure how fast a run reacts, so nothing runs beside them
  --all) workers="" && set -- -m "" "${@:2}" ;;
  --cuda) workers="" && set -- -m cuda "${@:2}" ;;
  --mutations) exec "$python" tests/mutations.py "${@:2}" ;;
esac
exec "$python" -m pytest tests -q $workers "$@"
