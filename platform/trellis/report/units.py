"""Numbers as a reader wants to see them: percent, KB and MB, milliseconds and minutes."""

from __future__ import annotations

import math

BYTES = ("B", "KB", "MB", "GB", "TB", "PB")
NONE = "–"
NOT_FINITE = "not finite"
_NARROW = "\N{NARROW NO-BREAK SPACE}"


def number(value: float | None, digits: int = 4) -> str:
    """Return ``value`` with ``digits`` significant digits; integers whole, with thousands apart."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return NOT_FINITE
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1e-3 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:,.{decimals}f}"
    return f"{value:.{digits - 1}e}"


def percent(value: float | None, decimals: int = 1) -> str:
    """Return a share in percent: ``0.9134`` is ``91.3 %``."""
    if value is None:
        return NONE
    return f"{100 * value:.{decimals}f}{_NARROW}%" if math.isfinite(value) else NOT_FINITE


def size(value: float | None) -> str:
    """Return bytes with a decimal unit (1 KB = 1000 B)."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return NOT_FINITE
    power = 0
    while abs(value) >= 999.5 and power < len(BYTES) - 1:
        value, power = value / 1000, power + 1
    return f"{_short(value)}{_NARROW}{BYTES[power]}"


def duration(value: float | None) -> str:
    """Return seconds as ms, s, min or h."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return NOT_FINITE
    if value == 0:
        return f"0{_NARROW}s"
    if abs(value) < 1:
        return f"{_short(value * 1000)}{_NARROW}ms"
    if abs(value) < 120:
        return f"{_short(value)}{_NARROW}s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes}{_NARROW}min {seconds}{_NARROW}s" if seconds else f"{minutes}{_NARROW}min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}{_NARROW}h {minutes}{_NARROW}min"


def metric(name: str, value: float | None, decimals: int = 2) -> str:
    """Return a metric's value: accuracies in percent, all else with four significant digits."""
    return percent(value, decimals) if is_share(name) else number(value)


def is_share(name: str) -> bool:
    """Say whether a metric lies between 0 and 1 and reads best in percent."""
    return "accuracy" in name


def lower_is_better(name: str) -> bool:
    """Say whether a metric's small values are the good ones, by the field's names."""
    return any(word in name for word in ("loss", "error", "mse", "mae", "rmse", "perplexity", "regret"))


def plus_minus(name: str, mean: float, sd: float | None) -> str:
    """Return ``mean ± sd`` with one unit behind both."""
    if sd is None or not math.isfinite(mean) or not math.isfinite(sd):
        return metric(name, mean)
    if is_share(name):
        return f"{100 * mean:.2f} ± {100 * sd:.2f}{_NARROW}%"
    if mean and 1e-3 <= abs(mean) < 1e6:
        decimals = max(0, 3 - math.floor(math.log10(abs(mean))))
        return f"{mean:,.{decimals}f} ± {sd:,.{decimals}f}"
    return f"{number(mean)} ± {number(sd)}"


def _short(value: float) -> str:
    """Three significant digits, without zeros that say nothing."""
    decimals = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
