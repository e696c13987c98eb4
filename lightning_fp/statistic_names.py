"""What statistics are called in sentences, and their values with a unit."""

from __future__ import annotations

import math
from collections.abc import Mapping

_NAMES: Mapping[str, str] = {
    "clamped_mass": "clamped mass",
    "clamped_fraction": "clamped share",
    "underflow": "underflow",
    "underflow_fraction": "underflow",
    "sqnr_db": "SQNR",
    "headroom_bits": "headroom",
    "nonfinite": "number of inf and NaN",
    "fallbacks": "number of fallbacks",
    "loss_gap": "loss gap to the baseline",
    "eval_gap": "evaluation gap",
    "parity/loss_gap": "loss gap to high precision",
    "parity/grad_cosine": "cosine of the gradients to those in high precision",
}

_UNITS: Mapping[str, str] = {
    **dict.fromkeys(("clamped_mass", "clamped_fraction", "underflow", "underflow_fraction"), "%"),
    **dict.fromkeys(("loss_gap", "eval_gap"), "%"),
    "sqnr_db": "dB",
    "headroom_bits": "bits",
}

_OVER_LAYERS: Mapping[str, str] = {
    "max": "largest {} of a layer",
    "min": "smallest {} of a layer",
    "mean": "mean {} of the layers",
}


def called(statistic: str) -> str:
    """A statistic in words; one that is not known by its own name.

    >>> called("clamped_mass/max"), called("sqnr_db/min"), called("fallbacks"), called("reward")
    ('largest clamped mass of a layer', 'smallest SQNR of a layer', 'number of fallbacks', 'reward')

    Args:
        statistic: a gate's or a limit's.
    """
    if statistic in _NAMES:
        return _NAMES[statistic]
    column, _, over = statistic.rpartition("/")
    if column in _NAMES and over in _OVER_LAYERS:
        return _OVER_LAYERS[over].format(_NAMES[column])
    return statistic


def measured(statistic: str, value: float) -> str:
    """A statistic's value with its unit: shares as `share` has them, without zeros at the end.

    >>> measured("clamped_mass/max", 0.1573), measured("sqnr_db", 4.8647), measured("fallbacks", 0)
    ('15.7%', '4.86 dB', '0')

    Args:
        statistic: a gate's or a limit's.
        value: as measured: a share of 1, not of 100.
    """
    unit = _UNITS.get(statistic) or _UNITS.get(statistic.rpartition("/")[0], "")
    if not math.isfinite(value):
        return f"{value}"
    if unit == "%":
        whole, point, digits = share(value).rstrip("%").partition(".")
        return f"{whole}{point}{digits.rstrip('0')}".rstrip(".") + "%"
    return f"{value:.3g} {unit}" if unit else f"{value:.4g}"


def share(value: float | None) -> str:
    """A share in percent, with as many digits as it needs.

    >>> share(0.01234), share(0), share(3e-7), share(None)
    ('1.23%', '0%', '0.00003%', '')

    Args:
        value: of 1; None where nothing was measured.
    """
    if value is None or math.isnan(value):
        return ""
    if not value:
        return "0%"
    size = abs(value) * 100
    digits = 0 if size >= 99.95 else 1 if size >= 10 else 2
    if size < 0.01:
        digits = 1 - math.floor(math.log10(size)) - 1
    return f"{value * 100:.{digits}f}%"
