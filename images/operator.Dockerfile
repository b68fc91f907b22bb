# The operator: no torch, not root. Build from the repository's root:
#   docker build -f images/operator.Dockerfile -t finetune-operator .
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY requirements/bootstrap.txt requirements/operator.txt requirements/
RUN python -m venv /build \
 && /build/bin/pip install --no-cache-dir --require-hashes -r requirements/bootstrap.txt \
 && python -m venv --without-pip /app \
 && /build/bin/uv pip install --no-cache --python /app/bin/python --compile-bytecode --require-hashes \
        -r requirements/operator.txt
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY trainer trainer
# One distribution holds both sides; the trainer's modules lie unused here, for nothing of the operator imports them.
RUN /build/bin/uv build --wheel --no-build-isolation --python /build/bin/python --out-dir /wheel . \
 && /build/bin/uv pip install --no-cache --python /app/bin/python --compile-bytecode --no-deps /wheel/*.whl

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="finetune-operator" \
      org.opencontainers.image.description="Reconciles FineTuneJobs" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /app /app
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT ["finetune-operator"]
CMD ["run"]
