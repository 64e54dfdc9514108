"""A placement whose worth is being measured: steps of the same load before and after the move, and the verdict.

Made by the controller when a move has ended, and asked at each beat from `until` on.
"""

from dataclasses import dataclass

from moe_agent.experts.decision_log import Decision
from moe_agent.experts.step_times import Gain, Samples, compare_step_times

# How often the time is prolonged in which a move is measured, while the difference is within the noise.
_MOST_LONGER = 3


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """No steps of the same load came before and after."""


@dataclass(frozen=True, slots=True)
class Prolonged:
    """The difference is within the noise: more steps are needed."""


Verdict = Gain | Unmeasured | Prolonged


@dataclass(slots=True, kw_only=True)
class Trial:
    """See the module.

    Attributes:
        decision: the line of the log that the gain is told in.
        before: step times before the move.
        until: step from which on it is judged.
        judged: whether it is taken back where it wins nothing.
        longer: how often it may still be prolonged.
    """

    decision: Decision
    before: Samples
    until: int
    judged: bool
    longer: int = _MOST_LONGER

    def judge(self, after: Samples, step: int, more_steps: int) -> Verdict:
        """What the move has won; prolonged by `more_steps` while that is not clear."""
        gain = compare_step_times(self.before, after)
        if gain is None:
            return Unmeasured()
        if not gain.is_clear and self.longer:
            self.longer -= 1
            self.until = step + more_steps
            return Prolonged()
        return gain


def explain_loss(gain: Gain) -> str:
    """Why a move is taken back."""
    lost_us, error_us = -gain.mean_s * 1e6, gain.error_s * 1e6
    what = "nothing won" if gain.is_clear else "no gain shown"
    return f"{what}: a step of the same load takes {lost_us:.0f} us longer (error {error_us:.0f} us)"
