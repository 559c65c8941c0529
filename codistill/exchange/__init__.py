"""How peers know each other: by weights, through a store that all of them reach, or by predictions, job to job."""
