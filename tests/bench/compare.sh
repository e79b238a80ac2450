#!/usr/bin/env bash
# Measures qlock-top beside lsof, fuser and lslocks on a population of images and processes, in one run; see compare.py.
#
#     tests/bench/compare.sh                      all sections
#     tests/bench/compare.sh list delay           some of them
#     tests/bench/compare.sh --growth             how the figures grow with images and processes
#     tests/bench/compare.sh --help               everything else
#
# Builds first, unless QLOCK_TOP and POPULATION name the programs.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(cd -- "$here/../.." && pwd)
release=${CARGO_TARGET_DIR:-$root/target}/release

for argument in "$@"; do
    case $argument in
        -h | --help) exec python3 "$here/compare.py" --help ;;
    esac
done

if [[ -z ${QLOCK_TOP:-} || -z ${POPULATION:-} ]]; then
    (cd -- "$root" && cargo build --release --locked --bins --examples)
fi
export QLOCK_TOP=${QLOCK_TOP:-$release/qlock-top}
export POPULATION=${POPULATION:-$release/examples/population}
# exec: a signal to this script is then one to the program that cleans up.
exec python3 "$here/compare.py" "$@"
