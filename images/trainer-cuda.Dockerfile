# The trainer for GPUs: torch with CUDA and NCCL from its wheels. Non-root. The node provides the driver.
#   make image-trainer-cuda        or: docker build -f images/trainer-cuda.Dockerfile -t finetune-trainer-cuda .
# With --build-arg EFA=1 it contains libfabric and aws-ofi-nccl, through which NCCL uses the Elastic Fabric Adapter.
ARG PYTHON_IMAGE=python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c

FROM ${PYTHON_IMAGE} AS base
# training.compile builds its kernels when a job starts.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log
# The image of Python has no bytecode, and a pod with a read-only root file system cannot keep what it compiles.
RUN python -m compileall -q -x '/(test|tests|idlelib|lib2to3|tkinter|turtledemo|ensurepip)/' \
        "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"

FROM base AS dependencies
WORKDIR /src
# Some builders have their own certificate authorities.
ARG SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
COPY requirements/bootstrap.txt requirements/trainer-cuda.txt requirements/
RUN python -m venv /build \
 && /build/bin/pip install --no-cache-dir --require-hashes -r requirements/bootstrap.txt \
 && python -m venv --without-pip /app \
 && /build/bin/uv pip install --no-cache --python /app/bin/python --compile-bytecode --require-hashes \
        -r requirements/trainer-cuda.txt

FROM dependencies AS efa
ARG EFA=0
ARG EFA_SOURCES=https://github.com
ARG RDMA_CORE_VERSION=60.1
ARG RDMA_CORE_SHA256=3c83b75d952e96461338ed6320360580660ff897c62c773bc52c36c481ed8304
ARG LIBFABRIC_VERSION=2.4.0
ARG LIBFABRIC_SHA256=13f508e1d770c44f872c4117d9bcbfc102dc9d7532d3292455e0e0e5ef7b3bba
ARG AWS_OFI_NCCL_VERSION=1.17.3
ARG AWS_OFI_NCCL_SHA256=0b3313e9ad48226cb143c8f1dead60bcd59a8083e582558ee44a438d58cc23c1
# Headers of the CUDA release in the lock file.
ARG CUDA_VERSION=13.2.86
ARG CUDA_CRT_SHA256=e3ab08801bf9b1e6dc979275d25e816bb5000521b648e19c324d5eef0c79f1da
ARG CUDA_CRT_AARCH64_SHA256=3294669c379ef3382804bc077fec22a48753a743c75c83c1ee3c224bb049423f
ARG NVML_SHA256=7521790e56a3eae3e3fbdaa555a66ff4159e7bc45b5d5a84f14f2e5951367603
ARG NVML_AARCH64_SHA256=cae2d003c96fe328ad3ad911a0d4e1237fbaca5d80baf35063e943aa1de4870d
COPY images/efa.sh images/
# Without EFA, /opt/efa is an empty folder.
RUN if [ "$EFA" = 1 ]; then sh images/efa.sh /build /app /opt/efa; else mkdir -p /opt/efa; fi

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
 && python images/sbom.py /own/share/sbom/finetune-trainer-cuda.spdx.json finetune-trainer-cuda "$1:$2"

FROM base
# First the gigabytes that change only with the lock files, then the layer that changes with every release.
COPY --from=efa /opt/efa /opt/efa
COPY --from=dependencies /app /app
COPY --from=own /own /app
COPY --from=examples /examples /opt/diffusers-examples
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="finetune-trainer-cuda" \
      org.opencontainers.image.description="Trains FineTuneJobs on GPUs" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="https://github.com/finetune-operator/finetune-operator" \
      org.opencontainers.image.licenses="Apache-2.0"
# The root file system is read-only in the pods; everything is written to volumes.
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    FINETUNE_DIFFUSERS_EXAMPLES=/opt/diffusers-examples \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility LD_LIBRARY_PATH=/opt/efa/lib
# The user of the training pods.
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["finetune-supervisor"]
