"""The rooms, floors and devices of four imaginary homes, one for each language.

`make_dataset.py` puts them into the sentence templates. A device has a domain, because Home Assistant's
templates ask for one: only a lock can be locked, only a valve or a cover can be opened.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Home:
    """What a family calls its rooms, floors and devices; `devices` maps a name to its domain."""

    areas: tuple[str, ...]
    floors: tuple[str, ...]
    devices: dict[str, str]


HOMES = {
    "nl": Home(
        areas=(
            "woonkamer", "keuken", "slaapkamer", "badkamer", "kinderkamer", "gang", "kantoor",
            "zolder", "garage", "tuin", "berging", "eetkamer",
        ),
        floors=("begane grond", "eerste verdieping", "tweede verdieping"),
        devices={
            "bureaulamp": "light", "leeslamp": "light", "schemerlamp": "light", "kerstverlichting": "light",
            "koffiezetapparaat": "switch", "waterkoker": "switch", "vijverpomp": "switch",
            "plafondventilator": "fan", "televisie": "media_player", "keukenradio": "media_player",
            "rolgordijn": "cover", "zonnescherm": "cover", "garagepoort": "cover",
            "voordeur": "lock", "achterdeur": "lock", "robotstofzuiger": "vacuum",
            "thermostaat": "climate", "radiator": "climate",
        },
    ),
    "fr": Home(
        areas=(
            "salon", "cuisine", "chambre", "salle de bain", "bureau", "couloir", "grenier", "garage",
            "jardin", "terrasse", "salle à manger", "buanderie",
        ),
        floors=("rez-de-chaussée", "premier étage", "deuxième étage"),
        devices={
            "lampe de bureau": "light", "lampe de chevet": "light", "lampadaire": "light",
            "guirlande": "light", "machine à café": "switch", "bouilloire": "switch",
            "pompe du bassin": "switch", "ventilateur de plafond": "fan", "télévision": "media_player",
            "radio": "media_player", "store banne": "cover", "rideau du salon": "cover",
            "porte du garage": "cover", "porte d'entrée": "lock", "portillon": "lock",
            "aspirateur robot": "vacuum", "thermostat": "climate", "radiateur": "climate",
        },
    ),
    "de": Home(
        areas=(
            "Wohnzimmer", "Küche", "Schlafzimmer", "Badezimmer", "Kinderzimmer", "Flur", "Büro",
            "Dachboden", "Garage", "Garten", "Esszimmer", "Keller",
        ),
        floors=("Erdgeschoss", "Obergeschoss", "Untergeschoss"),
        devices={
            "Schreibtischlampe": "light", "Leselampe": "light", "Stehlampe": "light",
            "Lichterkette": "light", "Kaffeemaschine": "switch", "Wasserkocher": "switch",
            "Teichpumpe": "switch", "Deckenventilator": "fan", "Fernseher": "media_player",
            "Küchenradio": "media_player", "Markise": "cover", "Dachfenster": "cover",
            "Garagentor": "cover", "Haustür": "lock", "Hintertür": "lock",
            "Saugroboter": "vacuum", "Thermostat": "climate", "Heizkörper": "climate",
        },
    ),
    "en": Home(
        areas=(
            "living room", "kitchen", "bedroom", "bathroom", "nursery", "hallway", "office", "attic",
            "garage", "garden", "dining room", "basement",
        ),
        floors=("ground floor", "first floor", "second floor"),
        devices={
            "desk lamp": "light", "reading lamp": "light", "floor lamp": "light", "fairy lights": "light",
            "coffee machine": "switch", "kettle": "switch", "pond pump": "switch",
            "ceiling fan": "fan", "television": "media_player", "kitchen radio": "media_player",
            "patio awning": "cover", "roller blind": "cover", "garage door": "cover",
            "front door": "lock", "back door": "lock", "robot vacuum": "vacuum",
            "thermostat": "climate", "radiator": "climate",
        },
    ),
}
