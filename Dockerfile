# The engine with PyTorch, CUDA, cuDNN and NCCL, which torch's own packages bring: the host needs its driver and the NVIDIA
# container toolkit alone. Nothing listens in it, nobody logs in to it, and it runs as a user without rights.
#
#   docker build -t engine --build-arg UID=$(id -u) . && mkdir -p runs
#   docker run --rm --gpus all --ipc host -v "$PWD/recipes:/engine/recipes:ro" -v "$PWD/data:/engine/data:ro" \
#       -v "$PWD/models:/engine/models" -v "$PWD/runs:/engine/runs" engine recipes/llama2_7b_lora.yaml
#
# Code may be mounted as well (-v "$PWD/engine:/engine/engine:ro"). Runs, logs and caches lie in /engine/runs, outside the image.
# TensorBoard: on the host, `tensorboard --logdir runs` listens on 127.0.0.1:6006; from afar, ssh -L 6006:127.0.0.1:6006 HOST.
FROM python:3.11-slim-bookworm

ARG UID=1000
RUN useradd --uid "$UID" --create-home --shell /usr/sbin/nologin engine && mkdir -p /engine/runs /engine/models && chown engine /engine /engine/runs /engine/models

ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1 ENGINE_PYTHON=/usr/local/bin/python HF_HOME=/engine/runs/.hub \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /engine
COPY setup.py pyproject.toml constraints.txt README.md LICENSE ./
COPY engine ./engine
RUN pip install -c constraints.txt -e '.[hub,parquet,gpu]'
COPY torchrun.sh environment.sh ./
COPY recipes ./recipes

USER engine
VOLUME ["/engine/runs", "/engine/models"]
ENTRYPOINT ["./torchrun.sh"]
