#!/usr/bin/env bash
# Print a line for each verdict of the task `alarm`, and raise the alarms: ./watch.sh [COUNT]
# It ends after COUNT verdicts (0: never).
set -euo pipefail
count=${1:-0}
broker=(-h "${MQTT_HOST:-localhost}" -p "${MQTT_PORT:-1883}")
limit=()
if ((count > 0)); then limit=(-C "$count"); fi

mosquitto_sub "${broker[@]}" -V 5 -q 1 "${limit[@]}" -t alarms/cold-store | while read -r verdict; do
    if jq --exit-status '.alarm' <<<"$verdict" >/dev/null; then
        jq --raw-output '"ALARM (\(.level)): \(.reason)"' <<<"$verdict"
        # Here goes what is to happen: a siren, a message, a valve.
    else
        jq --raw-output '"fine: \(.reason // .error.message)"' <<<"$verdict"
    fi
done
