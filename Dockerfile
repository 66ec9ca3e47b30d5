# Build:  docker build -t vault-csi-provider:0.1.0 .
#
# A tag can move. To build on the very image that you have tried, pin it by its digest:
#   docker build --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:... .
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS builder
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# Two environments, neither with a pip of its own: one builds the wheel, the other is all that the image keeps.
# Each installs only wheels whose hashes are locked, so no compiler is needed and nothing unknown gets in.
COPY requirements/build.txt requirements/runtime.txt requirements/
RUN python -m venv --without-pip /opt/build \
    && python -m venv --without-pip /opt/vault-csi-provider \
    && pip --python /opt/build/bin/python install \
        --no-compile --only-binary :all: --require-hashes -r requirements/build.txt \
    && pip --python /opt/vault-csi-provider/bin/python install \
        --no-compile --only-binary :all: --require-hashes -r requirements/runtime.txt
COPY pyproject.toml README.md LICENSE ./
COPY requirements/vault-csi-provider.cdx.json requirements/
COPY provider/ provider/
# Bytecode is made here: the container's root is read-only, and compiling at each start would take longer than
# the start. Unchecked, since the sources change no more, and a tool that rewrites file times would make it stale.
# All of it anew (-f): pip's last run has imported some of what it found installed, and left what checks file times.
RUN /opt/build/bin/python -m hatchling build --target wheel --directory /dist \
    && pip --python /opt/vault-csi-provider/bin/python install --no-compile --no-index --no-deps /dist/*.whl \
    && /opt/vault-csi-provider/bin/python -m compileall -f -q --invalidation-mode unchecked-hash \
        /opt/vault-csi-provider/lib

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="vault-csi-provider" \
      org.opencontainers.image.description="Secrets Store CSI driver provider for HashiCorp Vault and OpenBao" \
      org.opencontainers.image.licenses="Apache-2.0"
# Nothing is installed into a running container, so what could install goes. The base image comes without the
# standard library's bytecode, so it is made as above. The last line stops a build whose base has no CA certificates.
RUN pip uninstall --yes --quiet --root-user-action=ignore setuptools wheel pip \
    && rm -rf /usr/local/lib/python3.*/ensurepip \
    && python -m compileall -f -q --invalidation-mode unchecked-hash -x '/(idlelib|lib2to3|tests?)/' \
        /usr/local/lib/python3.* \
    && test -s /etc/ssl/certs/ca-certificates.crt
COPY --from=builder /opt/vault-csi-provider /opt/vault-csi-provider
# gRPC's C core writes plain text to stderr, between the lines of JSON, unless told not to.
ENV PATH=/opt/vault-csi-provider/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    GRPC_VERBOSITY=NONE
# No USER: the driver's socket directory belongs to root, and manifests written for the Go provider's image set no
# runAsUser, so they have to find root here. The program needs no right of root's: it runs under any user that may
# write to that directory, and daemonset/base/daemonset.yaml drops every capability.
ENTRYPOINT ["vault-csi-provider"]
