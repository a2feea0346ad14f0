"""What makes figures less than they seem, in sentences."""

from __future__ import annotations

from benchmarks.reporting.analysis import Merged, case_label, counted
from benchmarks.roofline import Ceilings
from benchmarks.tables import DISTURBED, has_drifted

# A change of the ceilings by more is told at the top.
UNSTEADY = 0.05


def warnings(merged: Merged) -> list[str]:
    """What makes the figures less than they seem, in sentences; empty for a run as it should be."""
    found = []
    for source in merged.sources:
        if not source.run.complete:
            left = f"; {_cases(source.run.left)} not run" if source.run.left else ""
            found.append(f"{source.name} is incomplete: the run ended before its last case{left}.")
    if skipped := sum(len(source.run.skipped) for source in merged.sources):
        found.append(f"{_cases(skipped)} skipped; the reasons are below.")
    for status, said in (("wrong", "Wrong answers"), ("failed", "Could not run")):
        names = [result.contender for case in merged.cases for result in case.results if result.status == status]
        if names:
            found.append(f"{said}: {len(names)}, of {', '.join(dict.fromkeys(names))}; the tables say why.")
    found += unsteady(merged)
    releases = {source.run.versions.get("torch") for source in merged.sources}
    if len(releases) > 1:
        found.append(f"The files are of different PyTorch releases: {', '.join(sorted(map(str, releases)))}.")
    if merged.measured_again:
        found.append(
            f"{_cases(merged.measured_again)} measured again in another file: of each, the measurement with the most "
            "contenders counts, of equals the newest."
        )
    return found


def unsteady(merged: Merged) -> list[str]:
    """Where the machine was not left alone, or not the same from first to last."""
    found = []
    disturbed = [(case.disturbance, case) for case in merged.cases if (case.disturbance or 0) > DISTURBED]
    if disturbed:
        most, case = max(disturbed, key=lambda pair: pair[0] or 0)
        found.append(
            f"Other processes ran beside the timing of {counted([c for _, c in disturbed])}, and took up to "
            f"{most:.0%} of the CPU ({case_label(case)}): these figures are not reliable."
        )
    drifted = [(case.drift, case) for case in merged.cases if case.drift is not None and has_drifted(case)]
    if drifted:
        worst, case = max(drifted, key=lambda pair: abs(pair[0] - 1))
        found.append(
            f"The device did not run evenly in {counted([c for _, c in drifted])}: the last third of the timing took "
            f"{worst:.2f} times as long as the first in {case_label(case)}."
        )
    for source in merged.sources:
        change = _largest_change(source.run.ceilings, source.run.ceilings_after)
        if abs(change) > UNSTEADY:
            found.append(f"{source.name}: a ceiling changed by {change:+.0%} from the first case to the last.")
    return found


def _largest_change(before: Ceilings | None, after: Ceilings | None) -> float:
    if before is None or after is None:
        return 0.0
    pairs = [(before.bytes_per_second, after.bytes_per_second)]
    pairs += [
        (rate, after.flops_per_second[d]) for d, rate in before.flops_per_second.items() if d in after.flops_per_second
    ]
    return max((later / earlier - 1 for earlier, later in pairs), key=abs)


def _cases(count: int) -> str:
    return "1 case was" if count == 1 else f"{count} cases were"
