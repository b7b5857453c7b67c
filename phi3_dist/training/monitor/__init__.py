"""What a run says of itself: metrics, health, times, trackers, transcript."""
