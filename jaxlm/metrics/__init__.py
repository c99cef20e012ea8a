"""What a run tells about itself: FLOPs and MFU, metrics files and trackers, events, progress, the loss curve."""
