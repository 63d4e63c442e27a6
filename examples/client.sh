#!/bin/sh
# Ask a running server what sounds in a recording.
#
#     htsat serve &
#     sh examples/client.sh examples/street.ogg [http://127.0.0.1:8000]
#
# A server that wants a token gets the one in HTSAT_TOKEN.
set -eu
recording=$1
server=${2:-http://127.0.0.1:8000}
name=$(basename "$recording")
ask() {
    # --retry waits as long as a busy server says (Retry-After)
    curl --silent --show-error --fail-with-body --retry 5 ${HTSAT_TOKEN:+--header "Authorization: Bearer $HTSAT_TOKEN"} "$@"
    echo
}

# the bytes as they are; what sounds
ask --data-binary "@$recording" --header 'Content-Type: application/octet-stream' "$server/v1/tag?top=3&name=$name"

# as a form, with one or more files; what sounds when
ask --form "file=@$recording" "$server/v1/detect?top=1"

# the models and their labels
ask "$server/v1/models"
