"""One tree of errors for the person at the keyboard. Programming faults are asserts.

Each message has three parts: what is wrong, where, and what to type. Only the
two command lines catch these; everything else lets them pass.
"""

from __future__ import annotations

AGAIN = 75  # exit code, "temporary failure" in sysexits.h: nothing is to be mended, the same command goes on


class CogError(Exception):
    """Something the user can put right. The command line prints it and exits with its code.

    Args:
        what: the fault in one sentence.
        where: file and line, option, or shard it was found in.
        fix: what to type or change next.

    Attributes:
        code: to exit with: 2, or `AGAIN`.
    """

    code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"where: {self.where}")
        if self.fix:
            lines.append(f"do:    {self.fix}")
        return "\n".join(lines)


class SettingError(CogError):
    """A setting that cannot be: out of range, unknown, or against another one."""


class DataRootError(CogError):
    """The data root or its lists cannot be trusted (not one clip's own fault)."""


class ModelError(CogError):
    """A checkpoint that is not there, or not the one that is needed."""


class ShardError(CogError):
    """A shard that is damaged, missing, foreign, or not committed."""


class StoreError(CogError):
    """A file that the place where it lies does not give, and why; of what is in the file this says nothing."""


class RunError(CogError):
    """A run that cannot start, go on, or be resumed as asked."""


class DiskError(CogError):
    """A disk that is full, or a file system that refuses; ``errno`` is the system's number for it."""

    def __init__(
        self, what: str, *, where: str | None = None, fix: str | None = None, errno: int | None = None
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.errno = errno
