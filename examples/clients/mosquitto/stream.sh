#!/usr/bin/env bash
# Watch an answer grow: ./stream.sh DEVICE PROMPT [MAX_TOKENS]. Chunks go to stderr, the whole answer to stdout.
set -euo pipefail
device=$1 prompt=$2 max_tokens=${3:-100}
broker=(-h "${MQTT_HOST:-localhost}" -p "${MQTT_PORT:-1883}")
id=$(</proc/sys/kernel/random/uuid)
request=$(jq -cn --arg id "$id" --arg prompt "$prompt" --argjson max_tokens "$max_tokens" \
    '{$id, messages: [{role: "user", content: $prompt}], $max_tokens, temperature: 0, stream: true}')

# With -d mosquitto_sub says when the broker has confirmed the subscription; stdbuf makes it say so at once.
exec {lines}< <(exec stdbuf -oL mosquitto_sub "${broker[@]}" -d -q 1 -W 60 -t "pipit/v1/$device/res/$id")
listener=$!
trap 'kill "$listener" 2>/dev/null || true' EXIT

while read -r -u "$lines" line; do
    case $line in
        Subscribed*)
            mosquitto_pub "${broker[@]}" -q 1 -t "pipit/v1/$device/req" -m "$request"
            echo "id $id" >&2
            ;;
        '{'*'"chat.completion.chunk"'*)
            # A gap in seq is a lost chunk, 0 again is a new beginning: the whole answer follows in any case.
            jq -r '"chunk \(.seq): \(.choices[0].delta.content | tojson)"' <<<"$line" >&2
            ;;
        '{'*)
            jq -r '.choices[0].message.content // error("\(.error.code): \(.error.message)")' <<<"$line"
            exit
            ;;
    esac
done
echo "no answer within a minute" >&2
exit 27
