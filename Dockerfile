# The image of an injected sidecar: the proxy, its init program, the network validator and await, at the paths that the
# injector expects (the same image serves all of its containers).
#
#   docker build -t linkerd-proxy .

FROM rust:1.95-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends cmake && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
ARG LINKERD_PROXY_VERSION=0.0.0-dev
ARG LINKERD_PROXY_GIT_SHA=
ARG LINKERD_PROXY_BUILD_DATE=
ARG LINKERD_PROXY_VENDOR=
ENV LINKERD_PROXY_VERSION=$LINKERD_PROXY_VERSION \
    LINKERD_PROXY_GIT_SHA=$LINKERD_PROXY_GIT_SHA \
    LINKERD_PROXY_BUILD_DATE=$LINKERD_PROXY_BUILD_DATE \
    LINKERD_PROXY_VENDOR=$LINKERD_PROXY_VENDOR
RUN cargo build --release --locked -p linkerd-proxy

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends iptables libcap2-bin \
    # Rules are made by an unprivileged user with two capabilities, not by root.
    && setcap cap_net_raw,cap_net_admin+eip /usr/sbin/xtables-nft-multi \
    && setcap cap_net_raw,cap_net_admin+eip /usr/sbin/xtables-legacy-multi \
    && rm -rf /var/lib/apt/lists/*
ARG LINKERD_PROXY_VERSION=0.0.0-dev
COPY LICENSE /usr/lib/linkerd/LICENSE
COPY --from=build /src/target/release/linkerd-proxy /usr/lib/linkerd/linkerd2-proxy
# A copy, not a link: capabilities belong to the file, and the proxy's own file must have none, or it could not be run
# where they are taken away.
COPY --from=build /src/target/release/linkerd-proxy /usr/lib/linkerd/linkerd2-proxy-init
RUN setcap cap_net_raw,cap_net_admin+eip /usr/lib/linkerd/linkerd2-proxy-init \
    && ln -s linkerd2-proxy /usr/lib/linkerd/linkerd2-network-validator \
    && ln -s linkerd2-proxy /usr/lib/linkerd/linkerd-await \
    && ln -s linkerd2-proxy /usr/lib/linkerd/linkerd2-proxy-identity \
    && ln -s ../lib/linkerd/linkerd2-proxy /usr/bin/linkerd-proxy \
    && echo "$LINKERD_PROXY_VERSION" > /usr/lib/linkerd/linkerd2-proxy-version.txt
ENV LINKERD2_PROXY_LOG=warn,linkerd=info \
    LINKERD2_PROXY_LOG_FORMAT=plain
USER 65534
ENTRYPOINT ["/usr/bin/linkerd-proxy"]
