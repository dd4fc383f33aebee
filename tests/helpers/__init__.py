"""What several tests share: the oracle, the cases that Hypothesis draws, processes."""
