"""Errors whose message is meant for the person at the keyboard: what was given, what is needed, what to do."""


class UserError(Exception):
    """A mistake in what the user asked for: one line on stderr, exit status 2.

    NOTE: subclasses take the message alone, so that they survive pickling between processes.
    """


class ConfigError(UserError):
    """A configuration that cannot be run."""


class DataError(UserError):
    """Data that is missing, empty or too short."""


class ClusterError(UserError):
    """Resources that were asked for and are not there."""


class RunError(UserError):
    """A run folder that is busy, unreadable, or belongs to a different run."""


class TrainingError(Exception):
    """A run that failed for a reason which is not the user's, told in one line: exit status 1.

    Raised by a rank, it says that to start the ranks again would not help.
    """


class LostError(TrainingError):
    """A run whose processes were ended by somebody else, so that none of them could say why."""
