# The image of babelray, for head, workers and a plain `docker run` alike. Why it is as it is and how
# to build it: docs/image.md. No BuildKit syntax: docker, podman, buildah and kaniko all build it.

# A site's own base, best by digest: Debian 12 or what offers the same Python. BUILD_BASE is what the
# packages are installed on; it may know a mirror and a certificate that the image need not know.
ARG BASE=debian:bookworm-slim
ARG BUILD_BASE=${BASE}

# gpu or cpu. torch's CUDA build, with NCCL, is what the package index has; the CPU build lies on an
# index of its own.
ARG VARIANT=gpu

# The build fails unless requirements.lock says the same.
ARG RAY_VERSION=2.60.0

# The time of every file that is installed here, so that it does not tell two builds apart.
ARG SOURCE_DATE_EPOCH=1767225600


# 1. The locked dependencies, in a layer of their own: gigabytes that new code does not change.
FROM ${BUILD_BASE} AS dependencies

# Debian keeps only the newest patch of a package, so a version written here would not build for long.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3-venv \
    && rm -rf /var/lib/apt/lists/*

ARG VARIANT
ARG RAY_VERSION
ARG SOURCE_DATE_EPOCH
# Another index for torch ("" for none beside pip's own), and settings of pip, if passed. A password in them stays in this stage, which is not published.
ARG TORCH_INDEX
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST

ENV DS_BUILD_OPS=0 \
    PIP_CONSTRAINT=/build/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONHASHSEED=0

WORKDIR /build
COPY requirements.lock pyproject.toml ./

# The lock knows all that is installed but setuptools, which torch requires and which builds what
# comes as source, with wheel (that is not installed). DeepSpeed compiles none of its operators, now or
# later: there is no compiler.
RUN case "${VARIANT}" in \
        cpu) index="${TORCH_INDEX-https://download.pytorch.org/whl/cpu}" ;; \
        gpu) index="${TORCH_INDEX-}" ;; \
        *) echo "VARIANT is '${VARIANT}': say gpu or cpu" >&2; exit 2 ;; \
    esac \
    && { grep --quiet --line-regexp --fixed-strings "ray==${RAY_VERSION}" requirements.lock \
        || { echo "RAY_VERSION is ${RAY_VERSION}, requirements.lock has another" >&2; exit 2; }; } \
    && { cat requirements.lock; echo setuptools==80.9.0; echo wheel==0.45.1; } > constraints.txt \
    && python3 -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
more = p["optional-dependencies"]; print(*p["dependencies"], *more["s3"], *more["gcs"], sep="\n")' \
        > wanted.txt \
    && python3 -m venv pip \
    && python3 -m venv --without-pip /opt/babelray \
    && pip/bin/pip --python /opt/babelray/bin/python install --no-compile \
        ${index:+--extra-index-url "${index}"} --requirement wanted.txt \
    && pip/bin/pip --python /opt/babelray/bin/python check \
    && /opt/babelray/bin/python -c 'import sys, torch; \
found = "gpu" if torch.version.cuda else "cpu"; \
sys.exit(None if found == sys.argv[1] else f"torch {torch.__version__} is for {found}: see TORCH_INDEX")' \
        "${VARIANT}"

# What never runs here: tests, headers and static libraries for compiling, Java. Then the bytecode:
# compiled now, as nothing can be written at run time, and unchecked, as no clock can change it. One
# process for each package: what a process compiled before shows in the next file's bytes. A file of
# torch is for Python 3.12 and fails; the test of the image counts what is missing.
RUN packages=$(echo /opt/babelray/lib/python3.*/site-packages) \
    && find "${packages}" -depth -type d -name tests -exec rm -rf {} + \
    && rm -rf "${packages}"/torch/test "${packages}"/torch/include "${packages}"/pyarrow/include \
        "${packages}"/ray/jars \
    && find "${packages}/torch/bin" -type f ! -name torch_shm_manager -delete \
    && find "${packages}" -name '*.a' -delete \
    && find "${packages}" -mindepth 1 -maxdepth 1 -print0 > packages.txt \
    && { xargs --null --arg-file packages.txt --max-args 1 --max-procs "$(nproc)" \
        /opt/babelray/bin/python -m compileall -q --invalidation-mode unchecked-hash || true; } \
    && find /opt/babelray -exec touch --no-dereference --date="@${SOURCE_DATE_EPOCH}" {} +


# 2. This project's own packages, a few megabytes.
FROM dependencies AS product

ARG SOURCE_DATE_EPOCH

WORKDIR /build/source
COPY cluster cluster
COPY trainer trainer
COPY model model
COPY data_shards data_shards
COPY k8s k8s
COPY README.md pyproject.toml ./

RUN /build/pip/bin/pip --python /opt/babelray/bin/python install --no-compile --no-deps \
        --prefix /product . \
    && /opt/babelray/bin/python -m compileall -q --invalidation-mode unchecked-hash \
        -s /product -p /opt/babelray /product \
    && find /product -exec touch --no-dereference --date="@${SOURCE_DATE_EPOCH}" {} +


# 3. What is published: Python, what KubeRay's probes call (bash, wget), and the two layers above.
FROM ${BASE} AS image

ARG VARIANT
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 wget \
    && if [ "${VARIANT}" = gpu ]; then \
        apt-get install --yes --no-install-recommends ibverbs-providers libibverbs1 librdmacm1; fi \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/cache/ldconfig/* \
        /var/log/* \
    && echo 'babelray:x:10001:10001::/tmp:/bin/bash' >> /etc/passwd \
    && echo 'babelray:x:10001:' >> /etc/group \
    && echo "PATH=/opt/babelray/bin:\$PATH" > /etc/profile.d/babelray.sh \
    && install --directory --owner 10001 --group 10001 /workspace/data /workspace/runs

COPY --from=dependencies /opt/babelray /opt/babelray
COPY --from=product /product /opt/babelray
COPY configs /workspace/configs

# Only /tmp must be writable, and it may be empty: so it is the home as well. Nothing is sent to
# Ray's makers. On a GPU machine the container toolkit brings the driver's part of CUDA.
ENV HOME=/tmp \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PATH=/opt/babelray/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    USER=babelray

WORKDIR /workspace
USER 10001:10001
RUN babelray --version && ray --version

ARG RAY_VERSION
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title=babelray \
    org.opencontainers.image.description="Distributed training of Transformers for translation" \
    org.opencontainers.image.licenses=Apache-2.0 \
    org.opencontainers.image.version=${VERSION} \
    org.opencontainers.image.revision=${REVISION} \
    dev.babelray.ray-version=${RAY_VERSION} \
    dev.babelray.variant=${VARIANT}

CMD ["babelray", "--help"]
