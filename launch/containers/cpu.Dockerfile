# phi3-dist without a GPU: plans, job scripts, data, and runs of small models. From a clone:
#
#   docker build --file launch/containers/cpu.Dockerfile --tag phi3-dist:cpu .
#   docker run --rm --shm-size=1g --volume "$PWD:/project" phi3-dist:cpu doctor
#   docker run --rm --shm-size=1g --volume "$PWD:/project" phi3-dist:cpu train configs/run/debug.yaml
#
# The container's user has the number 10001: a folder that it writes to must allow that, or add --user "$(id -u)".
# g++, ninja and Python's headers are for DeepSpeed, which compiles its operator for CPUs at the first run.
# Never built and never run: where this file was written there was no Docker daemon. It is linted with hadolint, and
# tests/unit/test_containers.py compares it with the package.
FROM python:3.12.12-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# no versions: Debian removes old ones from its mirrors
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git ninja-build \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 phi3 \
    && install --directory --owner 10001 /venv /project
USER 10001
ENV PATH=/venv/bin:$PATH \
    VIRTUAL_ENV=/venv \
    DS_BUILD_OPS=0
RUN python -m venv /venv

WORKDIR /tmp/phi3-dist
COPY --chown=10001 pyproject.toml README.md LICENSE constraints.txt ./
COPY --chown=10001 phi3_dist phi3_dist
COPY --chown=10001 configs configs
COPY --chown=10001 launch launch
# torch for CPUs first, from where PyTorch publishes it: the one on PyPI brings 3 GB of CUDA libraries
RUN pip install --no-cache-dir --constraint constraints.txt --index-url https://download.pytorch.org/whl/cpu torch \
    && pip install --no-cache-dir --constraint constraints.txt '.[deepspeed]'

WORKDIR /project
ENTRYPOINT ["phi3-dist"]
CMD ["--help"]
