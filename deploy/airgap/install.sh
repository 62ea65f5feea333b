#!/bin/sh
# Installs Quorate from a wheelhouse (make-wheelhouse.sh) into a virtual environment, without any network.
#
#     ./install.sh [-p PYTHON] [-s SUM] VENV
#
#   -p   Python to make the environment with (default: python3)
#   -s   SHA-256 of the file SHA256SUMS, as the maker of the wheelhouse told it by another way
#
# Files are checked first: every one that SHA256SUMS lists must be as it says, and there may be no other. Without -s
# that finds damage alone, since whoever can change a wheel can change SHA256SUMS too.
set -eu

python=python3 sum=''
while getopts 'p:s:' option; do
    case $option in
        p) python=$OPTARG ;;
        s) sum=$OPTARG ;;
        *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
if [ $# -ne 1 ]; then
    echo "usage: $0 [-p PYTHON] [-s SUM] VENV" >&2
    exit 2
fi
case $1 in
    /*) target=$1 ;;
    *) target=$PWD/$1 ;;
esac
cd "$(dirname "$0")"

fail() { echo "$1" >&2; exit 1; }

if [ -n "$sum" ]; then
    found=$(sha256sum SHA256SUMS | cut -d' ' -f1)
    [ "$found" = "$sum" ] || fail "SHA256SUMS is not the one you were told of ($found); nothing was installed."
else
    echo "note: without -s a wheelhouse that somebody changed on purpose is not noticed." >&2
fi
sha256sum --check --strict --quiet SHA256SUMS || fail "a file is not as SHA256SUMS says; nothing was installed."
find . -type f ! -name SHA256SUMS | LC_ALL=C sort >"${TMPDIR:-/tmp}/quorate-found.$$"
cut -c67- SHA256SUMS | LC_ALL=C sort >"${TMPDIR:-/tmp}/quorate-listed.$$"
extra=$(comm -23 "${TMPDIR:-/tmp}/quorate-found.$$" "${TMPDIR:-/tmp}/quorate-listed.$$")
rm -f "${TMPDIR:-/tmp}/quorate-found.$$" "${TMPDIR:-/tmp}/quorate-listed.$$"
[ -z "$extra" ] || fail "not listed in SHA256SUMS: $extra; nothing was installed."

[ -d "$target" ] || "$python" -m venv "$target"
# No index, mirror or folder that pip's own environment (--isolated) or configuration (/dev/null) names.
export PIP_CONFIG_FILE=/dev/null
"$target/bin/python" -m pip --isolated --disable-pip-version-check install --quiet --no-index --find-links wheels \
    --only-binary :all: -c constraints.txt "$(cat install.txt)"
"$target/bin/python" -m pip --isolated --disable-pip-version-check check
"$target/bin/quorate" --version
