# One image for every service; the command says which: `docker run … queryd run executor`.
# The Python is the one that everything is tested on.
FROM python:3.11.15-slim-bookworm AS build

# `--build-arg EXTRAS=service,traces` adds an optional one.
ARG EXTRAS=service

WORKDIR /build
COPY . .
# An environment of its own is one folder to copy. DuckDB's extensions come as wheels, so nothing is fetched later.
RUN python -m venv /opt/queryd \
    && /opt/queryd/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt ".[${EXTRAS}]" \
    && /opt/queryd/bin/pip uninstall --yes --quiet pip setuptools


FROM python:3.11.15-slim-bookworm

# A number is what an orchestrator can check not to be root.
RUN groupadd --system --gid 10001 queryd \
    && useradd --system --uid 10001 --gid queryd --home-dir /var/lib/queryd --shell /usr/sbin/nologin queryd \
    && install -d -o queryd -g queryd -m 0700 /var/lib/queryd /var/lib/queryd/scratch

COPY --from=build /opt/queryd /opt/queryd

ENV PATH=/opt/queryd/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    QUERYD_SCRATCH=/var/lib/queryd/scratch \
    QUERYD_HTTP_HOST=0.0.0.0 \
    QUERYD_HTTP_PORT=8080

USER 10001:10001
WORKDIR /var/lib/queryd
# An executor makes results and spills in QUERYD_SCRATCH: mount a disk there. It is no VOLUME, for that would give an
# anonymous volume to every container, of the other services and of each command too.
EXPOSE 8080

# The image has no curl. An executor on a busy machine takes some 10 s to start; whatever the proxy, this is loopback.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open(f\"http://127.0.0.1:{os.environ['QUERYD_HTTP_PORT']}/livez\", timeout=4)"]

ENTRYPOINT ["queryd"]
CMD ["--help"]
