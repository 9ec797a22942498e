"""Access to the parts of a report."""

from stayaligned.report import Report
from stayaligned.report.values import Arm


def arm_of(report: Report, name: str) -> Arm:
    return next(arm for arm in report.arms if arm.name == name)
