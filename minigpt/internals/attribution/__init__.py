"""Attribution: which components, tokens and layers a logit comes from."""
