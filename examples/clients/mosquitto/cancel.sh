#!/usr/bin/env bash
# Take a request back: ./cancel.sh DEVICE ID. Whoever waits for its answer gets the error `cancelled`.
set -euo pipefail
device=$1 id=$2
broker=(-h "${MQTT_HOST:-localhost}" -p "${MQTT_PORT:-1883}")

mosquitto_pub "${broker[@]}" -q 1 -t "pipit/v1/$device/cancel" -m "{\"id\": \"$id\"}"
