# DreamerV3 on a GPU host. CUDA comes as Python wheels; the host brings the driver and its container toolkit.
#
#   docker build -t dreamer .
#   docker run --gpus all --rm -v "$PWD/runs:/logdir" dreamer train --configs dmc_vision --logdir /logdir/walker
#
# Build arguments: ACCELERATOR (cuda12, cuda13, tpu), EXTRAS (environment extras, comma separated, may be empty).
FROM python:3.11-slim-bookworm

# Headless rendering: EGL on the GPU, Mesa where there is none.
RUN apt-get update \
 && apt-get install -y --no-install-recommends libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libgles2 libosmesa6 \
 && rm -rf /var/lib/apt/lists/*

ARG ACCELERATOR=cuda12
ARG EXTRAS=dmc,crafter

WORKDIR /opt/dreamer
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY dreamer ./dreamer
COPY configs ./configs
RUN pip install --no-cache-dir -c constraints.txt ".[${ACCELERATOR}${EXTRAS:+,${EXTRAS}}]"

# The NVIDIA runtime mounts only the driver libraries that are asked for; "graphics" brings EGL.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics \
    PYTHONUNBUFFERED=1

RUN useradd --create-home --uid 1000 dreamer && install -d -o dreamer -g dreamer /logdir
USER dreamer
WORKDIR /logdir
VOLUME /logdir

ENTRYPOINT ["dreamer"]
CMD ["train", "--logdir", "/logdir/quickstart"]
