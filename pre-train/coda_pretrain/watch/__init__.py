"""What a person sees of a run: metrics, MFU, profiles, trackers, plots."""
