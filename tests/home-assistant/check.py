"""A real Home Assistant beside a device: python - PORT-OF-THE-BROKER <check.py

Starts Home Assistant's core with its MQTT integration and nothing else, does what its user would do, and prints what it sees,
one JSON object a line: {"seen": …} at first, {"prompt": …}, {"ask": …} and {"model": …} after what was done, {"left": …} when
the device was taken away. Whoever runs it takes the device away after the fourth line.
"""

import asyncio
import json
import logging
import sys
import tempfile
from pathlib import Path

from homeassistant import bootstrap
from homeassistant.helpers import device_registry, entity_registry
from homeassistant.runner import RuntimeConfig

# What the unique ids of the device `hall.1` begin with.
OWN = "pipit-hall_1_"
NOW = "2025-01-01T00:00:00+00:00"
# The frontend and all that Home Assistant sets up for people.
bootstrap.DEFAULT_INTEGRATIONS = set()
bootstrap.CRITICAL_INTEGRATIONS = set()


def configure(folder, port):
    """The files of an installation whose user has set up MQTT."""
    (folder / "configuration.yaml").write_text(
        "homeassistant:\n  time_zone: UTC\nhttp:\n  server_host: 127.0.0.1\n  server_port: 18123\n"
    )
    entry = {
        "created_at": NOW, "modified_at": NOW, "data": {"broker": "127.0.0.1", "port": port}, "disabled_by": None,
        "discovery_keys": {}, "domain": "mqtt", "entry_id": "mqtt", "minor_version": 1, "version": 1, "options": {},
        "pref_disable_new_entities": False, "pref_disable_polling": False, "source": "user", "subentries": [],
        "title": "MQTT", "unique_id": None,
    }
    storage = folder / ".storage"
    storage.mkdir()
    (storage / "core.config_entries").write_text(json.dumps(
        {"version": 1, "minor_version": 4, "key": "core.config_entries", "data": {"entries": [entry]}}))


def say(**what):
    print(json.dumps(what, default=str), flush=True)


async def until(condition, seconds=60):
    for _ in range(seconds * 10):
        if condition():
            return
        await asyncio.sleep(0.1)
    raise TimeoutError(condition.__doc__ or "it did not come")


class House:
    """What can be seen of the device."""

    def __init__(self, hass):
        self.hass = hass

    def ids(self):
        """Entity ids by the ends of their unique ids."""
        entities = entity_registry.async_get(self.hass).entities.values()
        return {entry.unique_id.removeprefix(OWN): entry.entity_id for entry in entities if entry.platform == "mqtt"}

    def state(self, key):
        found = self.hass.states.get(self.ids().get(key, "sensor.none"))
        return {} if found is None else {"state": found.state, **found.attributes}

    def devices(self):
        return [{"name": device.name, "model": device.model, "manufacturer": device.manufacturer}
                for device in device_registry.async_get(self.hass).devices.values()]

    async def do(self, domain, service, key, **data):
        data["entity_id"] = self.ids()[key]
        await self.hass.services.async_call(domain, service, data, blocking=True)

    async def ask(self, domain, service, key, **data):
        heard = self.hass.states.get(self.ids()["answer"]).last_reported
        await self.do(domain, service, key, **data)
        await until(lambda: self.hass.states.get(self.ids()["answer"]).last_reported > heard)
        return self.state("answer")


async def main(port):
    folder = Path(tempfile.mkdtemp())
    configure(folder, port)
    hass = await bootstrap.async_setup_hass(RuntimeConfig(config_dir=str(folder), skip_pip=True, safe_mode=False))
    await hass.async_start()
    house = House(hass)
    await until(lambda: house.state("state").get("state") == "ready")
    await until(lambda: house.state("speed").get("state") not in (None, "unknown", "unavailable"))
    say(seen={key: house.state(key) for key in house.ids()}, devices=house.devices())
    prompt = 'Say "hello" to <Jörg> & {{ friends }}.'
    say(prompt=await house.ask("text", "set_value", "prompt", value=prompt))
    say(ask=await house.ask("notify", "send_message", "ask", message="Tell a long story about a wagtail. " * 10))
    model = house.state("model")
    other = next(option for option in model["options"] if option != model["state"])
    await house.do("select", "select_option", "model", option=other)
    await until(lambda: house.state("model").get("state") == other)
    say(model=other)
    await until(lambda: not house.ids() and not house.devices())
    say(left=house.ids())
    await hass.async_stop()


logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
asyncio.run(main(int(sys.argv[1])))
