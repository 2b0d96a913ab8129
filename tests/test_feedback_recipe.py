"""Tests configs/feedback-openai.yaml at a faulty provider; kills and restarts the run twice."""

from pathlib import Path

from chaos_feedback import compare


def test_faults_and_kills_change_neither_data_nor_costs(tmp_path: Path) -> None:
    """Runs without Ray until `pairs`; `chaos_feedback.py` runs all stages with 2,000 prompts."""
    here = str(Path(__file__).with_name("recipe_here.py"))
    compare(tmp_path, rows=40, program=(here, "--until", "pairs"))
