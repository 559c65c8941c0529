"""How peers exchange weights: snapshots on an object store that all of them can reach."""
