"""Exchange by checkpoint: peers known by the weights they publish now and then."""
