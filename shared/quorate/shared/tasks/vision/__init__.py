"""What tasks on images share: opening, augmentation, the loss of detectors."""
