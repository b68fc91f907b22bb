# The trainer for Intel CPUs: torch 2.8, IPEX 2.8 and oneccl_bind_pt 2.8, with libiomp5, tcmalloc and jemalloc. Non-root.
#   make image-trainer-cpu-intel        or: docker build -f images/trainer-cpu-intel.Dockerfile -t finetune-trainer-cpu-intel .
ARG PYTHON_IMAGE=python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c

FROM ${PYTHON_IMAGE} AS base
# training.compile builds its kernels when a job starts. The ranks preload an allocator (topology.cpu.allocator).
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libtcmalloc-minimal4 libjemalloc2 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log
# The image of Python has no bytecode, and a pod with a read-only root file system cannot keep what it compiles.
RUN python -m compileall -q -x '/(test|tests|idlelib|lib2to3|tkinter|turtledemo|ensurepip)/' \
        "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"

FROM base AS dependencies
WORKDIR /src
# Some builders have their own certificate authorities.
ARG SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
# Address of Intel's package index, the only one with the oneCCL binding.
ARG ONECCL_INDEX=
COPY requirements/bootstrap.txt requirements/trainer-intel.txt requirements/
RUN test -n "$ONECCL_INDEX" || { echo 'Set --build-arg ONECCL_INDEX=... to the index with oneccl_bind_pt'; exit 1; }
RUN python -m venv /build \
 && /build/bin/pip install --no-cache-dir --require-hashes -r requirements/bootstrap.txt \
 && python -m venv --without-pip /app \
 && /build/bin/uv pip install --no-cache --python /app/bin/python --compile-bytecode --require-hashes \
        -r requirements/trainer-intel.txt \
 && /build/bin/uv pip install --no-cache --python /app/bin/python --compile-bytecode --no-deps \
        --index-url "$ONECCL_INDEX" 'oneccl_bind_pt==2.8.*'

FROM dependencies AS examples
# Checksum of the source archive of the installed diffusers, whose examples training.script names. Empty: no examples.
ARG DIFFUSERS_SHA256=
ARG DIFFUSERS_SOURCES=https://github.com/huggingface/diffusers
COPY images/examples.sh images/
RUN sh images/examples.sh /app /examples

FROM dependencies AS own
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY trainer trainer
COPY images/sbom.py images/check_bytecode.py images/
# One distribution contains both sides; the trainer imports nothing of the operator.
RUN /build/bin/uv build --wheel --no-build-isolation --python /build/bin/python --out-dir /wheel . \
 && /build/bin/uv pip install --no-cache --python /app/bin/python --prefix /own --compile-bytecode --no-deps \
        /wheel/*.whl \
 && rm -rf /own/.lock /own/bin/finetune /own/bin/finetune-operator /own/lib/python3*/site-packages/finetune_operator \
 && set -- /app/lib/python3*/site-packages /own/lib/python3*/site-packages \
 && python images/check_bytecode.py "$1" "$2" "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
 && python images/sbom.py /own/share/sbom/finetune-trainer-cpu-intel.spdx.json finetune-trainer-cpu-intel "$1:$2"

FROM base
# First the gigabytes that change only with the lock files, then the layer that changes with every release.
COPY --from=dependencies /app /app
COPY --from=own /own /app
COPY --from=examples /examples /opt/diffusers-examples
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="finetune-trainer-cpu-intel" \
      org.opencontainers.image.description="Trains FineTuneJobs on CPU nodes: torch 2.8, IPEX 2.8, oneccl_bind_pt 2.8 (oneCCL 2021.15), libiomp5, tcmalloc, jemalloc" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="https://github.com/finetune-operator/finetune-operator" \
      org.opencontainers.image.licenses="Apache-2.0"
# The root file system is read-only in the pods; everything is written to volumes.
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    FINETUNE_DIFFUSERS_EXAMPLES=/opt/diffusers-examples
# The user of the training pods.
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["finetune-supervisor"]
