#!/usr/bin/env bash
# Ask with MQTT 3.1.1: ./ask-311.sh DEVICE PROMPT [REPLY_TOPIC]. Prints the text of the answer.
# Without a REPLY_TOPIC the answer comes to the device's own topic, pipit/v1/DEVICE/res/ID.
set -euo pipefail
device=$1 prompt=$2
broker=(-h "${MQTT_HOST:-localhost}" -p "${MQTT_PORT:-1883}")
id=$(</proc/sys/kernel/random/uuid)
reply=${3:-pipit/v1/$device/res/$id}
session=(mosquitto_sub "${broker[@]}" -V 311 -q 1 -i "ask-$id" -t "$reply")

# Subscribe in a session that the broker keeps (-c), and leave (-E): from now on no answer is lost. Without -c the same
# command ends the session.
"${session[@]}" -c -E
trap '"${session[@]}" -E' EXIT

request=$(jq -cn --arg id "$id" --arg prompt "$prompt" --arg reply "${3:-}" '
    {$id, messages: [{role: "user", content: $prompt}], max_tokens: 100, temperature: 0}
    + if $reply == "" then {} else {reply_to: $reply} end')
mosquitto_pub "${broker[@]}" -V 311 -q 1 -t "pipit/v1/$device/req" -m "$request"

# Come back for the answer, at most a minute.
answer=$("${session[@]}" -c -C 1 -W 60)
jq -r '.choices[0].message.content // error("\(.error.code): \(.error.message)")' <<<"$answer"
