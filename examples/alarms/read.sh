#!/usr/bin/env bash
# Send temperatures as a sensor would, bare numbers: ./read.sh DEVICE 4.5 5.1 12.0
set -euo pipefail
device=$1
shift
for reading in "$@"; do
    mosquitto_pub -h "${MQTT_HOST:-localhost}" -p "${MQTT_PORT:-1883}" -V 5 -q 1 -t "pipit/v1/$device/task/alarm" -m "$reading"
done
