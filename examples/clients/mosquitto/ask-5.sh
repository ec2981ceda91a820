#!/usr/bin/env bash
# Ask with MQTT 5: ./ask-5.sh DEVICE PROMPT. Plain text in, plain text out.
# mosquitto_rr subscribes to the reply topic, sends it along as Response Topic, and waits for one answer.
set -euo pipefail
device=$1 prompt=$2
broker=(-h "${MQTT_HOST:-localhost}" -p "${MQTT_PORT:-1883}")
id=$(</proc/sys/kernel/random/uuid)

mosquitto_rr "${broker[@]}" -V 5 -q 1 -W 60 -t "pipit/v1/$device/req" -e "reply/$id" -m "$prompt"
