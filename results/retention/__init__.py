"""What goes when its time is over, or when its owner is deleted for good."""
