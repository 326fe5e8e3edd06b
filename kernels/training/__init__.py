"""One training step with a head, on each backend: the frame that every update shares.

Draw a minibatch, run the networks forward, let a *head* turn their outputs into a loss and its
derivative, run them backward, clip and step Adam. PPO and cloning are heads; another algorithm is
one more, in an op of its own.
"""
