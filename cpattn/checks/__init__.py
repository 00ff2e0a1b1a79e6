"""`verify`: attention checked on the user's own machine, group, mask and tensors."""
