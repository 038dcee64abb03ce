# One image for the gateway, the Ray head and the workers: actors find the rooms in it by name.
FROM python:3.12-slim

# KubeRay's own probes call wget; its start commands run in bash, which the image has.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home kvrelay \
    && install -d -o kvrelay /home/kvrelay/.cache

WORKDIR /opt/kvrelay
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY control_plane control_plane
COPY decode_service decode_service
COPY gateway_service gateway_service
COPY kernels kernels
COPY kv_transfer kv_transfer
COPY model_runtime model_runtime
COPY prefill_service prefill_service
COPY proto proto
# ray[default]: the node agent answers KubeRay's probes only with it.
RUN pip install --no-cache-dir --constraint constraints.txt . "ray[default]"

USER kvrelay
WORKDIR /home/kvrelay
EXPOSE 50051
CMD ["kvrelay", "serve", "--host", "0.0.0.0"]
