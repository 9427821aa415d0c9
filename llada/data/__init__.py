"""From text to micro-batches: the prepared corpus on disk, the mixture of corpora, the plan of a step and its loader."""
