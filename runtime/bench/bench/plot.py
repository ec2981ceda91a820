"""The plot: four small panels, as SVG that needs nothing to be drawn."""

import math
from xml.sax.saxutils import escape

WIDTH, HEIGHT, MARGIN = 380, 240, 48
#: Readable on white and on black, and for those who do not see red and green apart.
COLOURS = {"pipit": "#0072b2", "llama-server": "#d55e00"}


def ticks(most):
    """Round numbers from 0 to at least `most`."""
    step = 1
    while most / step > 5:
        step *= 2.5 if str(step).startswith("2") else 2
    return [step * at for at in range(math.ceil(most / step) + 1)]


def panel(x, y, title, unit, labels, series):
    """One diagram: `series` is values by name, one for each label, 0 at the bottom."""
    marks = ticks(max(value for values in series.values() for value in values))
    left, right, top, bottom = x + MARGIN, x + WIDTH - 12, y + 34, y + HEIGHT - 34
    across = lambda at: left + (right - left) * (at + 0.5) / len(labels)  # noqa: E731
    up = lambda value: bottom - (bottom - top) * value / marks[-1]  # noqa: E731
    out = [f'<text x="{left}" y="{y + 18}" class="title">{escape(title)}</text>']
    for mark in marks:
        out.append(f'<line x1="{left}" x2="{right}" y1="{up(mark):.1f}" y2="{up(mark):.1f}" class="grid"/>')
        out.append(f'<text x="{left - 6}" y="{up(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>')
    for at, label in enumerate(labels):
        out.append(f'<text x="{across(at):.1f}" y="{bottom + 16}" text-anchor="middle">{escape(str(label))}</text>')
    out.append(f'<text x="{(left + right) / 2:.0f}" y="{bottom + 31}" text-anchor="middle">{escape(unit)}</text>')
    for name, values in series.items():
        points = " ".join(f"{across(at):.1f},{up(value):.1f}" for at, value in enumerate(values))
        dash = "" if name == "pipit" else ' stroke-dasharray="5 4"'
        out.append(f'<polyline points="{points}" stroke="{COLOURS[name]}"{dash}/>')
        out += [f'<circle cx="{across(at):.1f}" cy="{up(value):.1f}" r="3" fill="{COLOURS[name]}"/>'
                for at, value in enumerate(values)]
    return out


def svg(results):
    """The whole picture of how cost grows."""
    growth, about = results["growth"], results["about"]
    out = []
    clients = [row["clients"] for row in growth["clients"]]
    contexts = [row["context"] for row in growth["contexts"]]
    pick = lambda rows, key: {name: [row[name][key] for row in rows] for name in COLOURS}  # noqa: E731
    out += panel(0, 24, "tokens/s, all clients", "clients", clients, pick(growth["clients"], "tokens_per_s"))
    out += panel(WIDTH, 24, "resident memory, MiB", "clients", clients, pick(growth["clients"], "rss_mib"))
    out += panel(0, 24 + HEIGHT, "decode of one client, tokens/s", "tokens of context", contexts,
                 pick(growth["contexts"], "tokens_per_s"))
    out += panel(WIDTH, 24 + HEIGHT, "resident memory, MiB", "tokens of context", contexts,
                 pick(growth["contexts"], "rss_mib"))
    width, height = 2 * WIDTH, 2 * HEIGHT + 32
    legend = []
    for at, name in enumerate(COLOURS):
        x = MARGIN + 110 * at
        dash = "" if name == "pipit" else ' stroke-dasharray="5 4"'
        legend.append(f'<polyline points="{x},14 {x + 26},14" stroke="{COLOURS[name]}"{dash}/>'
                      f'<text x="{x + 32}" y="18">{name}</text>')
    note = f"{about['model']}, {about['threads']} threads, {about['machine']}"
    legend.append(f'<text x="{width - 12}" y="18" text-anchor="end">{escape(note)}</text>')
    style = ("text{font:12px sans-serif;fill:#333}.title{font-weight:bold}.grid{stroke:#ddd}"
             "polyline{fill:none;stroke-width:2}")
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                      f'height="{height}">', f"<style>{style}</style>",
                      f'<rect width="{width}" height="{height}" fill="#fff"/>', *legend, *out, "</svg>"]) + "\n"
