# One image for every verb of `ldm`; ranks under Slurm run in it where `cluster.container` says so (docs/slurm.md).
#   docker build -t ldm .
#   docker run --rm -v "$PWD/runs:/home/ldm/runs" ldm demo --fast
#
# The base needs apt and Python 3.11 or later as `python`; torch's wheels bring CUDA along, so that the host's driver
# is all a GPU needs. Pin it by digest for a release: --build-arg BASE_IMAGE=python:3.11-slim-bookworm@sha256:...
# --build-arg PIP_ARGS="--find-links FOLDER" or an index of CPU wheels makes the small image.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG PIP_ARGS=""
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY pipeline pipeline
COPY preprocessing preprocessing
COPY launch launch
# PIP_ARGS is several words on purpose.
# hadolint ignore=SC2086
RUN python -m venv /opt/ldm \
    && /opt/ldm/bin/python -m pip install --no-cache-dir ${PIP_ARGS} -c constraints.txt .

FROM ${BASE_IMAGE} AS run
# tini as PID 1: a stop of the container reaches `ldm` as a signal, and orphans are reaped. Its version follows the base.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 ldm \
    && useradd --uid 10001 --gid ldm --create-home ldm
COPY --from=build /opt/ldm /opt/ldm
WORKDIR /home/ldm
COPY configs configs
COPY examples examples
# Nothing is fetched or reported at run time; secrets come in by the environment of the run, never by the image.
ENV PATH=/opt/ldm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    GIT_PYTHON_REFRESH=quiet
USER 10001:10001
ENTRYPOINT ["/usr/bin/tini", "--", "ldm"]
CMD ["--help"]
