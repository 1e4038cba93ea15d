# This image is installed by the Makefile: in a virtual environment, with the exact versions of requirements.lock. It uses
# the CPU only.
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/fseft-edge
COPY . .
RUN make install-runtime VENV=/opt/venv RUNTIME=cpu

FROM python:3.11-slim
COPY --from=build /opt/venv /opt/venv
RUN useradd --create-home fseft
USER fseft
WORKDIR /home/fseft
ENTRYPOINT ["/opt/venv/bin/fseft-edge"]
