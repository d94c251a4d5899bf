"""Write figures for people: value with unit, how it is known, what it assumes."""

from collections.abc import Iterable, Iterator, Mapping

from trainer.observe.accounts import Total
from trainer.observe.energy import MEASURED
from trainer.observe.figures import J_PER_KWH, Figure
from trainer.observe.report_numbers import in_joules, three_digits

HEAD = ("figure", "value", "how it is known", "assumptions")
_HOW = {
    "measured": ("clock", *sorted(MEASURED)),
    "modelled": ("tdp_model", "limit_model"),
    "stated": ("stated",),
}
_LEAST_KWH, _LEAST_KG = 0.01, 0.1
"""Less is told in joules, and in grams."""
_LEAST_FRAC = 0.005
"""Less would be rounded to nothing."""


def figure_rows(figures: Iterable[Figure]) -> Iterator[tuple[str, str, str, str]]:
    """Yield the rows of a table under `HEAD`."""
    for figure in figures:
        assumed = "; ".join(figure.assumptions)
        yield figure.name, value_text(figure), known_text(figure.known_by), assumed


def value_text(figure: Figure) -> str:
    """Write a value with its unit."""
    if figure.unit == "frac":
        return f"{100 * figure.value:.1f} %"
    joules, _, per = figure.unit.partition("J")
    if not joules:
        return f"{in_joules(figure.value)}{per}"
    if figure.unit == "kWh":
        return energy_text(figure.value * J_PER_KWH)
    if figure.unit == "kgCO2e" and figure.value < _LEAST_KG:
        return f"{three_digits(figure.value * 1e3)} gCO2e"
    return f"{three_digits(figure.value)} {figure.unit}"


def energy_text(joules: float) -> str:
    """Write energy in kWh, or in joules if that is little."""
    kwh = joules / J_PER_KWH
    return in_joules(joules) if kwh < _LEAST_KWH else f"{three_digits(kwh)} kWh"


def known_text(known_by: Mapping[str, float]) -> str:
    """Write shares: '71 % measured (counter), 29 % modelled (tdp_model)'."""
    parts = []
    for how, names in _HOW.items():
        found = [name for name in names if name in known_by]
        if found:
            by = "" if found == [how] else f" ({', '.join(found)})"
            parts.append(f"{_percent(sum(known_by[name] for name in found))} {how}{by}")
    return ", ".join(parts) or "no meter"


def joules_text(total: Total) -> str:
    """Write the joules of each provenance: '12.3 kJ (counter), 1.20 kJ (tdp_model)'."""
    parts = [f"{in_joules(j)} ({p})" for p, j in total.joules_by.items() if j > 0]
    return ", ".join(parts) or "-"


def _percent(frac: float) -> str:
    if 0 < frac < _LEAST_FRAC:
        return "<1 %"
    if 1 - _LEAST_FRAC < frac < 1 - 1e-9:
        return ">99 %"
    return f"{100 * frac:.0f} %"
