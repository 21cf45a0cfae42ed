"""Measures of video quality, as pure functions over tensors; feature networks reach them as arguments."""
