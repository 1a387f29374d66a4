"""Lines in a frame, as SVG."""

COLOURS = ["#225588", "#cc3311", "#228833", "#aa3377", "#ee7733", "#6699cc", "#777777", "#111111"]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 60, 190, 36, 44


def number(value):
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def line_plot(title, x_label, curves, evenly=False):
    """curves: {name: [(x, y), ...]}, y from 0. `evenly`: each x that occurs gets the same room."""
    every = sorted({x for curve in curves.values() for x, _ in curve})
    top = max(y for curve in curves.values() for _, y in curve) or 1
    span = WIDTH - LEFT - RIGHT

    def across(x):
        if evenly:
            return LEFT + span * every.index(x) / max(1, len(every) - 1)
        return LEFT + span * (x - every[0]) / ((every[-1] - every[0]) or 1)

    def down(y):
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / top
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
             'font-family="sans-serif" font-size="12">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
             f'<text x="{LEFT}" y="18">{title}</text>',
             f'<text x="{LEFT + span / 2}" y="{HEIGHT - 8}" text-anchor="middle">{x_label}</text>']
    for part in range(5):
        y = top * part / 4
        lines.append(f'<line x1="{LEFT}" x2="{LEFT + span}" y1="{down(y):.1f}" y2="{down(y):.1f}" '
                     f'stroke="#ddd"/><text x="{LEFT - 6}" y="{down(y) + 4:.1f}" '
                     f'text-anchor="end">{number(y)}</text>')
    ticks = every if evenly else [every[0] + (every[-1] - every[0]) * i / 4 for i in range(5)]
    for x in ticks:
        lines.append(f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}" '
                     f'text-anchor="middle">{number(x)}</text>')
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in curve)
        lines += [f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>',
                  f'<text x="{LEFT + span + 12}" y="{TOP + 12 + 16 * i}" fill="{colour}">{name}</text>']
    return "\n".join([*lines, "</svg>"]) + "\n"
