"""The checks, in the order in which they run; each may fail without the next being lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from lightning_dist.doctor.checkpoints import FORMS, check_form
from lightning_dist.doctor.collectives import check_collectives, skip_collectives
from lightning_dist.doctor.devices import check_devices, check_links
from lightning_dist.doctor.kill import check_kill
from lightning_dist.doctor.layouts import layouts, partitions
from lightning_dist.doctor.parity import References, check_alone, check_layout, skip_layouts
from lightning_dist.doctor.report import Report
from lightning_dist.doctor.results import Check, CheckFailed, CheckResult, CheckSkipped, Details, Status
from lightning_dist.doctor.settings import Settings
from lightning_dist.doctor.timeouts import check_timeouts
from lightning_dist.doctor.versions import check_versions

KINDS = ("versions", "devices", "links", "alone", "collectives", "timeouts", "parity", "checkpoint", "kill")


def checks_of(settings: Settings) -> list[Check]:
    """All of them."""
    references = References(settings)
    of_layouts = layouts(settings.num_ranks)
    groups = [
        Check(
            f"collectives {len(partition[0])} ranks, stride {partition[0][1] - partition[0][0]}",
            partial(check_collectives, settings, partition, axes),
        )
        for partition, axes in partitions(settings.num_ranks).items()
    ]
    parity = [Check(f"parity {layout}", partial(check_layout, settings, references, layout)) for layout in of_layouts]
    widest = max(of_layouts, key=lambda layout: layout.count("="), default=None)
    return [
        Check("versions", check_versions),
        Check("devices", partial(check_devices, settings)),
        Check("links", partial(check_links, settings)),
        Check("alone", partial(check_alone, settings, references)),
        *(groups or [Check("collectives", partial(skip_collectives, settings))]),
        Check("timeouts", partial(check_timeouts, settings, widest)),
        *(parity or [Check("parity", partial(skip_layouts, settings))]),
        *(Check(f"checkpoint {form.name}", partial(check_form, settings, references, form)) for form in FORMS),
        Check("kill", partial(check_kill, settings, references)),
    ]


def chosen_checks(settings: Settings, only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[Check]:
    """The checks that a user asked for.

    Args:
        settings: of the examination.
        only: kinds, or whole names, of checks; all if empty.
        skip: those that are left out.

    Raises:
        ValueError: a name that no check has.
    """
    checks = checks_of(settings)
    names = {check.name for check in checks} | {check.kind for check in checks}
    for name in (*only, *skip):
        if name not in names:
            raise ValueError(
                f"no check is called {name!r}; kinds of checks are {', '.join(KINDS)}, or pass a whole name"
            )

    def is_named(check: Check, by: Sequence[str]) -> bool:
        return check.name in by or check.kind in by

    return [check for check in checks if (not only or is_named(check, only)) and not is_named(check, skip)]


def examine(
    settings: Settings,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    on_begin: Callable[[Report, str], None] = lambda report, name: None,
) -> Report:
    """Runs the checks, each in fresh processes.

    Args:
        settings: how many ranks, where, how long.
        only: see :func:`chosen_checks`.
        skip: see :func:`chosen_checks`.
        on_begin: called before each check, with all results so far and its name.

    Raises:
        ValueError: a name that no check has.
    """
    checks = chosen_checks(settings, only, skip)
    report = Report(settings.num_ranks, settings.device_type, len(checks))
    for check in checks:
        on_begin(report, check.name)
        report.results.append(run_check(check))
    return report


def run_check(check: Check) -> CheckResult:
    """The line of a check; an error of the check itself is a red one too."""
    begin = time.monotonic()

    def result(status: Status, reason: str, details: Details | None = None) -> CheckResult:
        return CheckResult(check.name, status, reason, round(time.monotonic() - begin, 2), details or {})

    try:
        finding = check.run()
    except CheckFailed as failed:
        return result("failed", failed.reason, failed.details)
    except CheckSkipped as skipped:
        return result("skipped", str(skipped))
    except Exception as error:
        return result("failed", f"the check itself raised {type(error).__name__}: {error}")
    return result("ok", finding.reason, finding.details)
