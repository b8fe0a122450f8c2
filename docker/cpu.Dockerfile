# The same commands as on a machine of one's own: make install, then any of the README's commands.
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home privtrain
WORKDIR /home/privtrain/app
COPY --chown=privtrain . .
RUN chown privtrain .
USER privtrain
RUN make install
ENV PATH=/home/privtrain/app/.venv/bin:$PATH ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
CMD ["privtrain", "--help"]
