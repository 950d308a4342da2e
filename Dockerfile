# Builder image: CPU torch, no CUDA. Stage 1 compiles wheels, stage 2 carries only what runs.
ARG BASE_IMAGE=python:3.11.14-slim-bookworm

FROM ${BASE_IMAGE} AS wheels
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential cmake git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY moe_edge moe_edge
COPY targets targets
COPY calibration calibration
# The CPU index is asked for torch alone, so that no other package can come from it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip wheel --no-cache-dir --wheel-dir /wheels --index-url "${TORCH_INDEX}" --no-deps "$(grep '^torch==' constraints.txt)" \
    && pip wheel --no-cache-dir --wheel-dir /wheels --find-links /wheels --constraint constraints.txt .

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="moe-edge" \
      org.opencontainers.image.licenses="Apache-2.0"
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 libstdc++6 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin edge
# The wheel folder is the pin: it was resolved from constraints.txt.
# hadolint ignore=DL3013
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels moe-edge
ENV XDG_CACHE_HOME=/work/.cache \
    MOE_EDGE_CACHE=/work/.cache/moe-edge \
    PYTHONUNBUFFERED=1
WORKDIR /work
RUN chown 10001:10001 /work
USER 10001
ENTRYPOINT ["moe-edge"]
CMD ["--help"]
