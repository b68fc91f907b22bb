"""The demo's world: a data set of coloured circles, and the small base model that was trained on it.

Nothing here knows about jobs, attempts or the operator. `circles` makes data and needs no torch; `train_base` trains
the model that `examples/base-circles` ships.
"""
