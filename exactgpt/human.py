"""Numbers as people read them."""


def human_bytes(n):
    """A number of bytes for people: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def human_time(seconds):
    """5h31m, 12m05s or 42s."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def human_count(n):
    """A number for people: 950, 2.5k, 10B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{float(f'{n / size:.3g}'):g}{unit}"  # twice: 999.9 is 1000, not 1e+03
    return f"{n:.3g}"


def human_rate(rate):
    """A learning rate for people: 6e-4, 1.5e-3."""
    digits, power = f"{rate:.1e}".split("e")
    return f"{float(digits):g}e{int(power)}" if rate else "0"
