# Builds the image of the chart's containers (`make image`) and its GPU variant (`make image-gpu`).
# Pin the base by its digest with --build-arg BASE=debian@sha256:…
ARG BASE=debian:bookworm-slim

# The operator's probes and start command need wget and bash; vLLM needs libnuma.
FROM ${BASE} AS base
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 bash wget ca-certificates libnuma1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home zephyr
ENV PATH=/opt/zephyr/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

FROM base AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv python3-dev g++ \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/zephyr
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src

FROM build AS packages-cpu
# Fallback index if the configured one lacks torch's CPU build.
ARG TORCH_INDEX=""
COPY requirements-cpu.lock .
RUN torch="$(grep '^torch==' requirements-cpu.lock)" \
 && { pip install -q --no-deps "$torch" \
   || pip install -q --no-deps --index-url "$TORCH_INDEX" "$torch"; } \
 && pip install -q --no-deps -r requirements-cpu.lock \
 && pip uninstall -q -y mypy ruff pytest pytest-timeout pytest-xdist hypothesis import-linter

FROM build AS packages-gpu
COPY requirements-gpu.lock .
RUN pip install -q --no-deps -r requirements-gpu.lock

# A separate stage, so that a change of our code does not reinstall the packages.
FROM build AS project
COPY pyproject.toml README.md LICENSE ./
COPY zephyr_ray zephyr_ray
COPY configs configs
RUN pip wheel -q --no-deps --wheel-dir /wheel .

# Shared by both runtimes.
FROM base AS runtime
COPY configs /home/zephyr/configs
WORKDIR /home/zephyr

# No compiler: nothing is compiled at run time on CPU (DeepSpeed's operators are unused, vLLM runs
# eagerly).
FROM runtime AS cpu
COPY --from=packages-cpu /opt/zephyr /opt/zephyr
RUN --mount=type=bind,from=project,source=/wheel,target=/wheel \
    pip install -q --no-deps --no-cache-dir /wheel/*.whl
USER 1000:1000

# Triton, FlashInfer and DeepSpeed compile for the GPU at run time, so g++, Python's headers, and nvcc
# from the lock stay.
FROM runtime AS gpu
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3-dev \
 && rm -rf /var/lib/apt/lists/*
COPY --from=packages-gpu /opt/zephyr /opt/zephyr
ENV CUDA_HOME=/opt/zephyr/lib/python3.11/site-packages/nvidia/cu13
RUN --mount=type=bind,from=project,source=/wheel,target=/wheel \
    pip install -q --no-deps --no-cache-dir /wheel/*.whl
USER 1000:1000
