# DreamerV3 in a container, one target for each kind of machine:
#
#   cpu       any machine; also TensorBoard, evaluation and plots
#   cuda12    NVIDIA, CUDA 12 (the last one: what `docker build .` makes)
#   cuda13    NVIDIA, CUDA 13
#   tpu       Google's TPU machines
#
#   docker build --target cuda12 --build-arg EXTRAS=dmc,plot --tag dreamer:cuda12 .
#   docker run --gpus all --rm -v "$PWD/runs:/logdir" dreamer:cuda12 train --configs dmc_vision --logdir /logdir/walker
#
# EXTRAS: extras of pyproject.toml, comma separated, may be empty. CUDA comes as Python wheels; the host brings the
# driver and the NVIDIA Container Toolkit. compose.yaml has TensorBoard beside training.
ARG EXTRAS=dmc,crafter

FROM python:3.11-slim-bookworm AS base
# Headless rendering: EGL on the GPU, Mesa where there is none. Debian keeps only its newest build of each package.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libgles2 libosmesa6 \
 && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 dreamer && install -d -o dreamer -g dreamer /logdir
WORKDIR /opt/dreamer
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY dreamer ./dreamer
COPY configs ./configs
COPY docker/dreamer-entrypoint docker/dreamer-healthy /usr/local/bin/
# Compiled programs lie beside the runs: a container that takes over need not compile again.
ENV PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/logdir/.cache
VOLUME /logdir
# Healthy while a run in /logdir writes metrics. Compilation and the first steps are in the start period.
HEALTHCHECK --interval=1m --timeout=10s --start-period=20m --retries=3 CMD ["dreamer-healthy"]
ENTRYPOINT ["dreamer-entrypoint"]
CMD ["train", "--logdir", "/logdir/quickstart"]

FROM base AS cpu
ARG EXTRAS
RUN pip install --no-cache-dir -c constraints.txt ".${EXTRAS:+[${EXTRAS}]}"
WORKDIR /logdir
USER 1000

FROM base AS tpu
ARG EXTRAS
RUN pip install --no-cache-dir -c constraints.txt ".[tpu${EXTRAS:+,${EXTRAS}}]"
WORKDIR /logdir
USER 1000

# The NVIDIA runtime mounts only the driver libraries that are asked for; "graphics" brings EGL.
FROM base AS nvidia
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics

FROM nvidia AS cuda13
ARG EXTRAS
RUN pip install --no-cache-dir -c constraints.txt ".[cuda13${EXTRAS:+,${EXTRAS}}]"
WORKDIR /logdir
USER 1000

FROM nvidia AS cuda12
ARG EXTRAS
RUN pip install --no-cache-dir -c constraints.txt ".[cuda12${EXTRAS:+,${EXTRAS}}]"
WORKDIR /logdir
USER 1000
