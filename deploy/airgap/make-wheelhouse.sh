#!/bin/sh
# Makes a wheelhouse on a machine with a network, for one without: our wheel, everything it requires at the versions of
# constraints.txt, and SHA256SUMS over all of it.
#
#     deploy/airgap/make-wheelhouse.sh [-w client|server] [-e EXTRAS] [-p PYTHON] [-t TORCH_INDEX] OUT
#
#   -w   client (default): the wheel for sites; server: the whole of Quorate
#   -e   extras, such as parquet,images
#   -p   Python that the other machine has, same version and platform (default: python3)
#   -t   index to take torch from (PyTorch's installation page names that of the CPU builds); else pip's own
#
# Wheels alone are taken, no source archive, so nothing is built or run while downloading. OUT must not exist.
set -eu

which=client extras='' python=python3 torch_index=''
while getopts 'w:e:p:t:' option; do
    case $option in
        w) which=$OPTARG ;;
        e) extras="[$OPTARG]" ;;
        p) python=$OPTARG ;;
        t) torch_index=$OPTARG ;;
        *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
if [ $# -ne 1 ]; then
    echo "usage: $0 [-w client|server] [-e EXTRAS] [-p PYTHON] [-t TORCH_INDEX] OUT" >&2
    exit 2
fi
out=$1
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
case $which in
    client) project=$root/deploy/client-wheel name=quorate_client ;;
    server) project=$root name=quorate ;;
    *) echo "-w: client or server, not $which" >&2; exit 2 ;;
esac
if [ -e "$out" ]; then
    echo "$out exists; name a folder that does not, so that nothing old gets into it." >&2
    exit 2
fi
mkdir -p "$out/wheels"
out=$(cd "$out" && pwd)

pip() { "$python" -m pip --disable-pip-version-check "$@"; }

pip wheel --quiet --no-deps --wheel-dir "$out/wheels" "$project"
wheel=$(ls "$out"/wheels/"$name"-*.whl)
cp "$root/constraints.txt" "$here/install.sh" "$out/"
if [ -n "$torch_index" ]; then
    pip download --quiet --only-binary :all: --no-deps -c "$out/constraints.txt" --index-url "$torch_index" \
        --dest "$out/wheels" torch
fi
# --find-links: a torch that lies there already is not fetched again from elsewhere.
pip download --quiet --only-binary :all: -c "$out/constraints.txt" --find-links "$out/wheels" --dest "$out/wheels" \
    "$wheel$extras"
printf '%s%s\n' "$(basename "$wheel" | cut -d- -f1 | tr _ -)" "$extras" >"$out/install.txt"

cd "$out"
# Everything that install.sh will read or run, itself too; not the sums.
find . -type f ! -name SHA256SUMS | LC_ALL=C sort | xargs -d '\n' sha256sum >SHA256SUMS
echo "$out: $(ls wheels | wc -l) wheels, $(du -sh wheels | cut -f1)."
echo "Carry it over, and this by another way (it is the sum of all sums):"
sha256sum SHA256SUMS
