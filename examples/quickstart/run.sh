#!/bin/sh
# Starts the proxy pair with two small applications behind it, prints what to try, and stops everything on Ctrl-C.
# Needs a Rust toolchain and a C compiler; no privilege. `run.sh COMMAND…` runs COMMAND once all is ready, then stops.
set -eu
cd "$(dirname "$0")/../.."
cargo build --release --bin linkerd-proxy --bin echo
bin=${CARGO_TARGET_DIR:-target}/release
state=$(mktemp -d)
pids=""
trap 'kill $pids 2>/dev/null || true; wait 2>/dev/null || true; rm -rf "$state"' EXIT
trap 'exit 130' INT TERM

"$bin/linkerd-proxy" identity init "$state/identity" >"$state/identity.log"
"$bin/echo" v1 127.0.0.2:8081 & pids="$pids $!"
"$bin/echo" v2 127.0.0.2:8082 & pids="$pids $!"
proxy() { # name, then settings
    name=$1 ip=$2
    env LINKERD2_PROXY_INBOUND_LISTEN_ADDR="$ip:4143" \
        LINKERD2_PROXY_OUTBOUND_LISTEN_ADDR="$ip:4140" \
        LINKERD2_PROXY_ADMIN_LISTEN_ADDR="$ip:4191" \
        "$bin/linkerd-proxy" run --manifests examples/quickstart/manifests --workload "shop/$name" \
        --identity "$state/identity" >"$state/$name.log" 2>&1 & pids="$pids $!"
}
proxy client 127.0.0.1
proxy web 127.0.0.2
for ip in 127.0.0.1 127.0.0.2; do
    "$bin/linkerd-proxy" await --timeout 20s --address "$ip" || { cat "$state"/*.log >&2; exit 1; }
done
cat <<TEXT

The pair runs: curl -> client's proxy (127.0.0.1:4140) -> mutual TLS -> web's proxy (127.0.0.2:4143) -> the applications.
Try, in another terminal:

  curl -H 'Host: web.shop' http://127.0.0.1:4140/                          # nine in ten answers from v1
  curl -H 'Host: web.shop' -H 'canary: yes' http://127.0.0.1:4140/         # v2; see the client's identity it was told
  curl -i -H 'Host: web.shop' 'http://127.0.0.1:4140/slow?delay=1s'        # 504 after 300 ms
  curl -x http://127.0.0.1:4140 http://web-v1.shop/                        # as an HTTP proxy
  curl -i http://127.0.0.2:8082/                                           # past the mesh: the application itself
  curl -s http://127.0.0.2:4191/metrics | grep ^request_total              # who called, over TLS or not

Edit examples/quickstart/manifests/*.yaml while it runs; the proxies follow. Logs: $state/*.log. Ctrl-C stops it.
TEXT
if [ $# -gt 0 ]; then "$@"; else wait; fi
