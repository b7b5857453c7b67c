# phi3-dist on NVIDIA GPUs, from a clone:
#
#   docker build --file launch/containers/cuda.Dockerfile --tag phi3-dist:cuda .
#   docker run --rm --gpus all --ipc=host --volume "$PWD:/project" phi3-dist:cuda doctor
#   docker run --rm --gpus all --ipc=host --volume "$PWD:/project" phi3-dist:cuda \
#       launch --config_file configs/accelerate/zero2.yaml --num_processes 8 -m phi3_dist train RUN.yaml
#
# The host needs a driver that is new enough for CUDA 13.0, and NVIDIA's container toolkit. torch brings the CUDA
# libraries that it runs on; the base image adds nvcc, with which DeepSpeed can compile its operators. --ipc=host: the
# ranks share memory. Never built and never run: where this file was written there was no Docker daemon. It is linted
# with hadolint, and tests/unit/test_containers.py compares it with the package.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# no versions: Ubuntu removes old ones from its mirrors
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git ninja-build python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 phi3 \
    && install --directory --owner 10001 /venv /project
USER 10001
ENV PATH=/venv/bin:$PATH \
    VIRTUAL_ENV=/venv \
    DS_BUILD_OPS=0
RUN python3.12 -m venv /venv

WORKDIR /tmp/phi3-dist
COPY --chown=10001 pyproject.toml README.md LICENSE constraints.txt ./
COPY --chown=10001 phi3_dist phi3_dist
COPY --chown=10001 configs configs
COPY --chown=10001 launch launch
RUN pip install --no-cache-dir --constraint constraints.txt '.[gpu]'

WORKDIR /project
ENTRYPOINT ["phi3-dist"]
CMD ["--help"]
