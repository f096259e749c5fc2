#!/bin/sh
# The S3 server of docker-compose.yml: SeaweedFS with two identities, from the environment. The writer does everything,
# the reader may read and list the one bucket; whoever has neither key is refused.
set -eu

identities=/tmp/identities.json
cat > "$identities" <<END
{"identities": [
  {"name": "writer", "credentials": [{"accessKey": "$S3_WRITER_KEY_ID", "secretKey": "$S3_WRITER_SECRET"}],
   "actions": ["Admin", "Read", "Write", "List", "Tagging"]},
  {"name": "reader", "credentials": [{"accessKey": "$S3_READER_KEY_ID", "secretKey": "$S3_READER_SECRET"}],
   "actions": ["Read:$S3_BUCKET", "List:$S3_BUCKET"]}
]}
END

# The options of the last start, which it would prefer to these.
rm -f /data/mini.options

# Its parts find each other on loopback, so that a new address of the container changes nothing. All of them listen on the
# network `store`, where only the service `s3` is, which passes on the port of S3. -master.telemetry would report to its makers. -idleTimeout is how long a stop waits for idle connections.
exec /entrypoint.sh mini -dir=/data -ip=127.0.0.1 -ip.bind=0.0.0.0 -s3.port=8333 -s3.config="$identities" \
    -master.telemetry=false -admin.ui=false -webdav=false -s3.port.iceberg=0 -s3.port.lance=0 -idleTimeout=2
