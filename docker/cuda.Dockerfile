# For NVIDIA GPUs. torch brings the CUDA libraries; the host brings the driver (nvidia-container-toolkit).
#   docker build -f docker/cuda.Dockerfile -t privtrain:cuda .
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/home/privtrain/app/runs" \
#     privtrain:cuda launch/accelerate/zero2.yaml my-recipe.yaml
FROM python:3.11-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 privtrain
WORKDIR /home/privtrain/app
COPY --chown=1000:1000 . .
RUN chown 1000:1000 .
USER 1000:1000
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
RUN make install DEV= DEMO= PIP_FLAGS="--no-cache-dir --no-compile --extra-index-url ${TORCH_INDEX}"
# What is needed to install stays behind: git, make, pip's caches.
FROM python:3.11-slim-bookworm
# Triton and DeepSpeed compile small helpers at the first start.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 privtrain
WORKDIR /home/privtrain/app
COPY --from=build --chown=1000:1000 /home/privtrain/app .
USER 1000:1000
ENV PATH=/home/privtrain/app/.venv/bin:$PATH \
    DS_BUILD_OPS=0 \
    OMP_NUM_THREADS=4
HEALTHCHECK --interval=5m --timeout=2m CMD ["privtrain", "doctor"]
# Arguments: an accelerate config, a recipe, and dotted overrides.
ENTRYPOINT ["docker/entrypoint.sh"]
