# The image `generative-img-serving`: the gateway (target `gateway`, the default) and a worker (target `worker`).
#
#   docker build -t generative-img-serving .
#   docker build -t generative-img-serving-worker --target worker .
#
# Another package index is the builder's own affair: --secret id=pip,src=$HOME/.config/pip/pip.conf
# docs/deployment/docker.md has the rest; scripts/container-image builds it and tries it.

# any Debian or Ubuntu; for a gateway with Python 3.11 or newer and its venv
ARG BASE=python:3.13-slim-bookworm
ARG WORKER_BASE=${BASE}

# ---- what both are made of

FROM ${BASE} AS build
WORKDIR /build
COPY scripts/container-venv scripts/
COPY requirements requirements
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=cache,target=/root/.cache/pip \
    scripts/container-venv dependencies
COPY . .
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=cache,target=/root/.cache/pip \
    scripts/container-venv program

# ---- worker: built on its own base, which may be another

FROM ${WORKER_BASE} AS worker-base
# the bases of GPU vendors come without Python
RUN python3 -c 'import ensurepip, venv' 2>/dev/null \
    || { apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*; }

FROM worker-base AS worker-build
ARG WITH_DIFFUSERS=0
ARG TORCH=torch
WORKDIR /build
COPY scripts/container-venv scripts/
COPY requirements requirements
COPY pyproject.toml .
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=cache,target=/root/.cache/pip \
    scripts/container-venv dependencies
COPY . .
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=cache,target=/root/.cache/pip \
    scripts/container-venv program

FROM worker-base AS worker
WORKDIR /app
# any user may write where nothing is mounted, and nobody removes what is another's; a new volume is made like this too
RUN --mount=type=bind,source=scripts/container-venv,target=/tmp/container-venv \
    /tmp/container-venv bytecode && install -d -m 1777 /app/data
COPY --from=worker-build /opt/img-serving /opt/img-serving
# models of the hub are kept in the volume; a GPU's driver is put in by its container toolkit
ENV PATH=/opt/img-serving/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/app/data/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
VOLUME ["/app/data"]
EXPOSE 50051
STOPSIGNAL SIGTERM
# a large model takes minutes to load
HEALTHCHECK --interval=30s --timeout=10s --start-period=15m --retries=3 \
    CMD ["img-serving", "health", "--url", "grpc://127.0.0.1:50051"]
ENTRYPOINT ["img-serving"]
CMD ["worker", "--host", "0.0.0.0"]
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="generative-img-serving-worker" \
      org.opencontainers.image.description="A worker that serves a picture model over gRPC to an img-serving gateway" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}"

# ---- gateway: the default, because it is the last

FROM ${BASE} AS gateway
WORKDIR /app
# any user may write where nothing is mounted, and nobody removes what is another's; a new volume is made like this too
RUN --mount=type=bind,source=scripts/container-venv,target=/tmp/container-venv \
    /tmp/container-venv bytecode \
    && install -d /app/config \
    && install -d -m 1777 /app/data /app/generated_images
COPY --from=build /opt/img-serving /opt/img-serving
ENV PATH=/opt/img-serving/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONUNBUFFERED=1
USER 10001:10001
VOLUME ["/app/config", "/app/generated_images", "/app/data"]
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s --retries=3 CMD ["img-serving", "health"]
ENTRYPOINT ["img-serving"]
CMD ["serve"]
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="generative-img-serving" \
      org.opencontainers.image.description="One OpenAI-compatible gateway in front of many image-generation backends" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}"
