# The same commands as on a machine of one's own. Build in the repository root:
#   docker build -f docker/cpu.Dockerfile -t privtrain:cpu .
#   docker run --rm -v "$PWD/runs:/home/privtrain/app/runs" privtrain:cpu launch/accelerate/cpu.yaml launch/recipes/demo.yaml
FROM python:3.11-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 privtrain
WORKDIR /home/privtrain/app
COPY --chown=1000:1000 . .
RUN chown 1000:1000 .
USER 1000:1000
RUN make install DEV= PIP_FLAGS="--no-cache-dir --no-compile"
# What is needed to install stays behind: git, make, pip's caches.
FROM python:3.11-slim-bookworm
RUN useradd --create-home --uid 1000 privtrain
WORKDIR /home/privtrain/app
COPY --from=build --chown=1000:1000 /home/privtrain/app .
USER 1000:1000
ENV PATH=/home/privtrain/app/.venv/bin:$PATH \
    ACCELERATE_USE_CPU=true \
    DS_ACCELERATOR=cpu \
    OMP_NUM_THREADS=1
HEALTHCHECK --interval=5m --timeout=2m CMD ["privtrain", "doctor"]
# Arguments: an accelerate config, a recipe, and dotted overrides.
ENTRYPOINT ["docker/entrypoint.sh"]
