"""The data set of the demo, which shows coloured circles, and the small base model that is trained on it.

This package does not depend on jobs, attempts or the operator. `circles` writes the data set and does not need torch.
`train_base` trains the model in `examples/base-circles`.
"""
