# Image of evm-deploy for NVIDIA Jetson (JetPack 6): TensorRT of the base image. Never built: it needs the board.
#
#     python -m release.wheels
#     docker build -f release/docker/jetson.Dockerfile -t evm-jetson .
#     docker run --rm --runtime nvidia -v "$PWD/dist/NAME:/bundle" --entrypoint python3 evm-jetson /bundle/finish.py
#     docker run --rm --runtime nvidia -v "$PWD/dist/NAME:/bundle" -v "$PWD/images:/images" evm-jetson /bundle /images
#
# An engine fits one release of TensorRT and one GPU: finish.py builds it on the board, into the bundle.
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY dist/wheels /tmp/wheels
RUN python3 -m venv --system-site-packages /opt/evm \
    && /opt/evm/bin/pip install --no-cache-dir /tmp/wheels/*linux*_aarch64.whl 'cuda-python>=12,<13' \
    && rm -r /tmp/wheels
ENTRYPOINT ["/opt/evm/bin/evm-run"]
