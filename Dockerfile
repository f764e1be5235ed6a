# Image with nesso-tune, for one machine, for cloud jobs, and as the container of Slurm jobs:
#
#   docker build -t nesso-tune .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" -w /work nesso-tune nesso-tune train recipe.yaml
#
# torch's own wheels bring the libraries of CUDA or ROCm: the image needs no others. TORCH_INDEX names an index with
# another build of torch, see https://pytorch.org/get-started/locally, e.g. one for ROCm or for an older driver.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm

# gcc: Triton compiles its launchers on the GPU machine.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/nesso-tune
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY nesso_tune nesso_tune
COPY recipes recipes
COPY data_templates data_templates

ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1
# hadolint ignore=DL3013
RUN if [ -n "$TORCH_INDEX" ]; then \
      pip install --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"; \
    fi \
    && pip install --constraint constraints.txt .

# No entry point: the runtimes of clusters start commands of their own. Nothing is downloaded into the image; mount a
# folder and set HF_HOME and NESSO_TUNE_CACHE to keep what is.
CMD ["nesso-tune", "--help"]
