"""Who may see which calibration rows: the one place that says so.

A profile has N rows of S tokens, and the teacher's statistics are of all of them. What is decided or fitted on some is judged on
others:

    0 ........ fit ........ | ....... search goes on ....... | judge | N
    0 .................. train ....................| held out ........ N

The plan's judging rows are the last ones, the search reads the others; an action (refit, merge, ...) is fitted on the first
ones, never on a judging row; training never sees the held-out rows, which are the last ones too, nor is anything fitted on them.
Artifacts are judged on other text altogether (validate.text), of which no row may occur here. Torch-free.
"""

from dataclasses import dataclass

from moe_edge.contracts.errors import ConfigError

HELD_OUT_SHARE = 0.05  # of the rows, at least one: what training never sees
HEALTH_TOKENS = 512  # on which the routing of teacher and student is counted


@dataclass(frozen=True)
class RowSplit:
    """Ranges of row numbers. With a single row everything is that row; `shared` says so."""

    rows: int
    row_tokens: int

    @property
    def shared(self) -> bool:
        """Is there only one row, so that what is fitted on it is judged on it, too?"""
        return self.rows == 1

    def _last(self, tokens: int) -> range:
        """The last rows that hold about `tokens` tokens, at least one."""
        return range(self.rows - min(self.rows, max(1, tokens // self.row_tokens)), self.rows)

    def judge(self, tokens: int) -> range:
        """On which a plan's candidates are compared; beside it a row is left to fit on, if there are two."""
        last = self._last(tokens)
        return last if self.shared else range(max(last.start, 1), self.rows)

    def search(self, judge_tokens: int) -> range:
        """What the swap search may read: all that does not judge its result."""
        return range(0) if self.shared else range(self.judge(judge_tokens).start)

    def fit(self, tokens: int, judge_tokens: int) -> range:
        """On which an action is fitted: the first rows that hold about `tokens` tokens, none that judges it or is held out."""
        if self.shared:
            return range(1)
        unseen = min(self.judge(judge_tokens).start, self.held_out().start)
        return range(min(max(1, tokens // self.row_tokens), unseen))

    def held_out(self) -> range:
        """On which training is judged: the last 5 %, at least one.

        Raises:
            ConfigError: a single row cannot be split.
        """
        if self.rows < 2:
            why = f"{self.rows} calibration row; one is held out to measure the recovery"
            raise ConfigError("too little calibration text to distill", where="calibration.tokens", why=why)
        return range(self.rows - max(1, round(self.rows * HELD_OUT_SHARE)), self.rows)

    def train(self) -> range:
        """What training may read. Raises ConfigError as `held_out`."""
        return range(self.held_out().start)

    def health(self) -> range:
        """On which routing is counted; nothing is decided by it."""
        return self._last(HEALTH_TOKENS)
