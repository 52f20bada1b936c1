"""Long chains of thought for stage 2, made of verifiable problems (`kimivl synthesize`).

Ask a teacher (`ask.py`), keep every response in a journal (`journal.py`), then sift: read the trace (`traces.py`),
verify its answer, check it (`checks.py`, `language.py`), let a judge look at it (`judge.py`), drop duplicates and
choose (`select.py`), write shards and say what became of everything (`report.py`, `picture.py`).
Sources: Kimi k1.5 (arXiv 2501.12599) section 2.2, Kimi-VL (arXiv 2504.07491) section 2.4.
"""

from kimivl.synthesize.checks import Checks
from kimivl.synthesize.judge import Judge
from kimivl.synthesize.select import Selection
from kimivl.synthesize.synthesis import Synthesis

__all__ = ["Checks", "Judge", "Selection", "Synthesis"]
