# Image of a bundle for Intel PCs and edge boxes: OpenVINO on the CPU.
#
#     python -m release.wheels
#     docker build -f release/docker/openvino.Dockerfile --build-arg BUNDLE=dist/NAME -t NAME .
#     docker run --rm -v "$PWD/images:/images" NAME /images
FROM debian:bookworm-slim
ARG BUNDLE
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY dist/wheels /tmp/wheels
RUN python3 -m venv /opt/evm \
    && /opt/evm/bin/pip install --no-cache-dir "$(ls /tmp/wheels/*linux*_$(uname -m).whl)[run-openvino]" \
    && rm -r /tmp/wheels
COPY ${BUNDLE} /opt/bundle
RUN useradd --system --create-home evm
USER evm
RUN /opt/evm/bin/evm-run /opt/bundle --selftest
ENTRYPOINT ["/opt/evm/bin/evm-run", "/opt/bundle"]
